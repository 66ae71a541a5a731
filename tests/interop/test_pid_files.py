"""Who has a pid file keeps it: nbdserve, nbd-overlay and the fence, in the foreground and as daemons."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
import pytest

from nbdserve.backends.imagelocks import EXCLUSIVE, WRITER, ImageLocks
from overlay.formats.flat import create as flat
from overlay.formats.image import Backing
from tests.support.disks import MIB, random_bytes, random_disk
from tests.support.processes import Argument, Process, is_alive, run, wait_until
from tests.support.servers import UnixAddress, nbdserve, qemu_nbd

BIN = Path(sys.executable).parent
DAEMONS = ["nbdserve", "nbd-overlay"]
ALL = [*DAEMONS, "fence"]
TO_THE_BACKGROUND = {"nbdserve": "--fork", "nbd-overlay": "--daemonize"}


def command(program: str, directory: Path, pid_file: Path, *options: Argument) -> list[Argument]:
    """A command line with an image of its own, made here; its socket lies beside the image."""
    directory.mkdir()
    image, socket = directory / "disk.img", directory / "sock"
    if program == "nbd-overlay":
        flat.create(image, flat.new_header(MIB, (Backing("nbd://127.0.0.1:1/", raw=True),)))
        return [BIN / program, "serve", image, "-k", socket, "--pid-file", pid_file, *options]
    random_disk(image, MIB)
    if program == "fence":
        return [BIN / "nbd-migrate", "fence", pid_file, image]
    return [BIN / program, "-f", "raw", "-k", socket, "--pid-file", pid_file, *options, image]


@contextmanager
def running(argv: list[Argument], log: Path, pid_file: Path) -> Iterator[int]:
    """The process id of a command that is ready; it is ended by SIGTERM."""
    background = [word for word in TO_THE_BACKGROUND.values() if word in argv]
    if background:
        started = run(*argv, seconds=20)
        assert started.returncode == 0, started.stderr
        pid = int(pid_file.read_text())
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "the daemon has ended")
        return
    with Process(argv, log) as process:
        process.wait_for_pid_file(pid_file)
        yield process.pid
        if process.running:
            assert process.terminate() == 0, process.output()


@pytest.mark.parametrize("second_forks", [False, True])
@pytest.mark.parametrize("first_forks", [False, True])
@pytest.mark.parametrize("program", DAEMONS)
def test_a_second_process_is_refused_and_the_firsts_file_stays(
    tmp_path: Path, program: str, first_forks: bool, second_forks: bool
) -> None:
    pid_file = tmp_path / "pid"
    fork = TO_THE_BACKGROUND[program]
    first = command(program, tmp_path / "first", pid_file, *([fork] if first_forks else []))
    second = command(program, tmp_path / "second", pid_file, *([fork] if second_forks else []))
    with running(first, tmp_path / "first.log", pid_file) as pid:
        assert pid_file.read_text() == f"{pid}\n"
        before = pid_file.stat()
        refused = run(*second, seconds=20)
        assert refused.returncode == 1
        why = f"{pid_file}: process {pid} has this pid file: end it first, or choose another path"
        assert refused.stderr == f"{program}: {why}\n"
        assert not (tmp_path / "second" / "sock").exists()
        after = pid_file.stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert is_alive(pid)
    assert not pid_file.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_second_fence_is_refused_and_the_firsts_file_stays(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    first, second = (command("fence", tmp_path / name, ready) for name in ("first", "second"))
    with running(first, tmp_path / "first.log", ready) as pid:
        refused = run(*second, seconds=20)
        assert refused.returncode == 1
        assert f"{ready}: process {pid} has this pid file" in refused.stderr
        assert ready.read_text() == f"{pid}\n"
    assert not ready.exists()


@pytest.mark.parametrize("program", ALL)
def test_what_a_killed_process_has_left_is_taken_over(tmp_path: Path, program: str) -> None:
    pid_file = tmp_path / "pid"
    with running(command(program, tmp_path / "first", pid_file), tmp_path / "1.log", pid_file) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "it has ended")
        assert pid_file.read_text() == f"{pid}\n"
        second = command(program, tmp_path / "second", pid_file)
        with Process(second, tmp_path / "2.log") as process:
            process.wait_for(lambda: pid_file.read_text() == f"{process.pid}\n", "its own pid file")
            assert process.terminate() == 0
    assert not pid_file.exists()


def test_it_is_the_last_that_goes_so_that_who_waits_for_it_can_start_again(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    argv = command("nbdserve", tmp_path / "first", pid_file)
    image = tmp_path / "first" / "disk.img"
    os.truncate(image, 64 * MIB)
    with Process(argv, tmp_path / "log") as process:
        process.wait_for_pid_file(pid_file)
        client = nbd.NBD()
        client.connect_uri(UnixAddress(tmp_path / "first" / "sock").uri())
        for place in range(0, 64 * MIB, MIB):
            client.pwrite(random_bytes(MIB), place)
        client.shutdown()
        process.signal(signal.SIGTERM)
        wait_until(lambda: not pid_file.exists(), "the pid file has gone", interval=0)
        with image.open("r+b") as file:
            ImageLocks(file.fileno(), str(image)).hold(WRITER, EXCLUSIVE)
        assert process.wait() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_where_rights_were_dropped_the_file_is_emptied_and_taken_over_next_time(tmp_path: Path) -> None:
    # Only root may write where the pid file is.
    tmp_path.chmod(0o755)
    pid_file = tmp_path / "pid"
    argv = command("nbdserve", tmp_path / "first", pid_file, "--user=nobody")
    for _ in range(2):
        with Process(argv, tmp_path / "log") as process:
            process.wait_for(lambda: pid_file.exists() and pid_file.read_text(), "the pid file")
            assert pid_file.read_text() == f"{process.pid}\n"
            assert process.terminate() == 0, process.output()
        assert pid_file.read_text() == ""


def test_qemu_nbd_and_nbdserve_honour_each_others_files(tmp_path: Path) -> None:
    image = tmp_path / "other.img"
    random_disk(image, MIB)
    with qemu_nbd("-f", "raw", image, directory=tmp_path) as stock:
        pid_file = tmp_path / "qemu-nbd1.pid"
        refused = run(*command("nbdserve", tmp_path / "second", pid_file), seconds=20)
        assert (refused.returncode, f"process {stock.pid} has this pid file" in refused.stderr) == (1, True)
    with nbdserve("-f", "raw", image, directory=tmp_path) as ours:
        pid_file = tmp_path / "nbdserve1.pid"
        line: list[Argument] = ["-f", "raw", "-r", "-k", tmp_path / "q.sock", "--pid-file", pid_file, image]
        refused = run("qemu-nbd", *line, seconds=20)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
        assert pid_file.read_text() == f"{ours.pid}\n"
