"""The ground that the other tests stand on: children die with us, and none is left unnoticed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from tests.support import servers
from tests.support.disks import ODD_SIZE, random_disk, sparse_disk, sparse_runs
from tests.support.processes import NotReadyError, Process, check, is_alive, run, wait_until
from tests.support.servers import Address, Server, UnixAddress, free_tcp_address

ROOT = Path(__file__).resolve().parents[2]


def test_a_child_dies_when_the_test_run_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, time; from tests.support.processes import Process;"
        f"print(Process(['sleep', '60'], pathlib.Path({str(tmp_path / 'child.log')!r})).pid, flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: child.name() == "sleep", "setpriv has become the command")
        parent.kill()
    wait_until(lambda: not is_alive(child.pid), "the child has died", seconds=5)


def test_waiting_for_a_process_that_ends_says_what_it_wrote(tmp_path: Path) -> None:
    with (
        Process(["sh", "-c", "echo no such disk; exit 3"], tmp_path / "server.log") as process,
        pytest.raises(NotReadyError, match=r"(?s)ended with 3.*no such disk"),
    ):
        process.wait_for_line("ready")


def test_a_process_that_ignores_sigterm_fails_the_test(tmp_path: Path) -> None:
    with Process(["sh", "-c", "trap '' TERM; echo up; exec sleep 60"], tmp_path / "server.log") as process:
        process.wait_for_line("up")
        with pytest.raises(NotReadyError, match="did not end within"):
            process.terminate(seconds=0.3)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.exhaustive
def test_a_test_that_leaves_a_daemon_behind_fails_and_the_daemon_is_killed(tmp_path: Path) -> None:
    (tmp_path / "test_leak.py").write_text(
        "import subprocess\n"
        "def test_leak():\n"
        f"    subprocess.run('setsid sleep 60 & echo $! > {tmp_path}/pid', shell=True)\n"
    )
    done = run(
        sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", tmp_path, tmp_path, cwd=ROOT
    )
    assert done.returncode == 1
    assert "left processes behind" in done.stdout
    assert "sleep 60" in done.stdout
    daemon = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_alive(daemon), "the daemon has died", seconds=5)


STOCK = {
    "qemu-nbd": lambda image, **where: servers.qemu_nbd("-f", "raw", image, **where),
    "nbdkit": lambda image, **where: servers.nbdkit("file", image, **where),
    "nbd-server": lambda image, **where: servers.nbd_server(image, **where),
}


@pytest.mark.parametrize("place", ["unix", "127.0.0.1", "::1"])
@pytest.mark.parametrize("name", STOCK)
def test_stock_servers_are_ready_when_they_are_said_to_be(name: str, place: str, tmp_path: Path) -> None:
    start: Callable[..., AbstractContextManager[Server]] = STOCK[name]
    content = random_disk(tmp_path / "disk.img", 1 << 20)
    at: Address = UnixAddress(tmp_path / "socket") if place == "unix" else free_tcp_address(place)
    with start(tmp_path / "disk.img", directory=tmp_path, at=at) as server:
        export = "disk" if name == "nbd-server" else ""
        check("nbdcopy", server.uri(export), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content


def test_a_sparse_disk_has_the_holes_that_were_asked_for(tmp_path: Path) -> None:
    runs = sparse_runs(ODD_SIZE)
    content = sparse_disk(tmp_path / "disk.img", runs)
    assert len(content) == ODD_SIZE
    for run_ in runs:
        assert any(content[run_.offset : run_.offset + run_.length]) == run_.data
    assert (tmp_path / "disk.img").stat().st_blocks * 512 < ODD_SIZE
