"""Threads that come and go, and those that are not to be had: who pays, and that the rest goes on."""

from __future__ import annotations

import os
import pwd
import sys
import threading
from collections.abc import Container, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdserve.backends.nbd import open_nbd
from nbdserve.common.uri import parse_uri
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Export, Exports
from tests.support.disks import MIB, random_disk
from tests.support.inprocess import running
from tests.support.processes import Argument, check, run, wait_until
from tests.support.servers import Server, nbdserve
from tests.support.wire import Command, Wire, request

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="the limit of processes does not bind our own user")
USER = "games"
"""A user that nothing else on the machine runs as: the kernel counts all processes of a user together."""
WITHOUT_THREADS = """
import sys, threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
from {module} import main
sys.exit(main())
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 16 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, 16 * MIB)
    path.chmod(0o666)
    return path


def workers(others: Container[threading.Thread] = ()) -> int:
    """How many threads for requests that wait there are in this process."""
    return sum(thread.name == "worker" and thread not in others for thread in threading.enumerate())


def test_an_export_that_was_busier_than_it_has_threads_answers_after_a_rest(
    image: Path, tmp_path: Path
) -> None:
    """Four connections with 64 reads each in flight, then so long a rest that all threads have ended."""
    # Those of a test before, whose policy gives them longer, are none of this one.
    others = set(threading.enumerate())
    with nbdserve("-f", "raw", image, directory=tmp_path) as upstream:
        backend = open_nbd(parse_uri(upstream.uri()), read_only=False)
        exports, policy = Exports([Export("", backend)]), Policy(worker_idle=0.1)
        try:
            with running(exports, tmp_path, policy) as (_, address):
                for _ in range(3):
                    check("nbdcopy", "--connections=4", "--requests=64", address.uri(), "null:")
                    wait_until(lambda: workers(others) == 0, "the threads have ended", seconds=60)
                    with Wire(address, 60) as wire:
                        wire.go()
                        wire.send(request(Command.READ, 0, 512, cookie=7))
                        assert wire.simple_reply().cookie == 7
                        assert len(wire.receive(512)) == 512
        finally:
            exports.close()


@pytest.fixture
def crowded(image: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that has given up its rights, so that limits bind it."""
    with nbdserve("-f", "raw", f"--user={USER}", image, directory=tmp_path) as server:
        yield server


def limit_threads(server: Server, more: int) -> None:
    """Let it have so many threads more than it has."""
    most = len(list(Path(f"/proc/{server.pid}/task").iterdir())) + more
    user = pwd.getpwnam(USER)
    # Its own user may always do that; root may not everywhere.
    same = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    check(*same, "prlimit", f"--pid={server.pid}", f"--nproc={most}:")


def flush_is_answered(wire: Wire, times: int = 1) -> bool:
    """Whether so many flushes at once, for which threads are wanted, are answered."""
    wire.send(*[request(Command.FLUSH, cookie=number) for number in range(times)])
    return sorted(wire.simple_reply().cookie for _ in range(times)) == list(range(times))


@root_only
def test_a_full_table_of_processes_costs_the_one_client_that_comes_then(crowded: Server) -> None:
    limit_threads(crowded, 5)
    with ExitStack() as stack:
        served = [stack.enter_context(Wire(crowded.address)) for _ in range(5)]
        for wire in served:
            wire.go()
        for _ in range(3):
            with Wire(crowded.address) as turned_away:
                assert turned_away.is_closed_by_server()
        output = crowded.process.output()
        assert output.count("turned away: no thread can be started") == 3
        assert all(flush_is_answered(wire) for wire in served)
        served[0].socket.close()
        wait_until(lambda: len(list(Path(f"/proc/{crowded.pid}/task").iterdir())) <= 5, "a thread has ended")
        check("nbdinfo", "--size", crowded.uri())
        assert all(flush_is_answered(wire) for wire in served[1:])
    assert crowded.process.terminate() == 0


@root_only
@pytest.mark.parametrize("flushes", [1, 200])
def test_requests_that_wait_are_served_without_threads_and_the_pool_recovers(
    crowded: Server, flushes: int
) -> None:
    with Wire(crowded.address) as wire:
        wire.go()
        limit_threads(crowded, 0)
        for _ in range(3):
            assert flush_is_answered(wire, flushes)
        assert crowded.process.output().count("threads for requests that wait must do") == 1
        limit_threads(crowded, 3)
        assert flush_is_answered(wire, flushes)
        wait_until(lambda: len(list(Path(f"/proc/{crowded.pid}/task").iterdir())) >= 3, "the pool has grown")
    assert crowded.process.terminate() == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--metrics=127.0.0.1:0"],
        ["--qmp=unix:{directory}/qmp"],
        ["--stdio"],
        ["-f", "qcow2"],
        ["--export", "far=nbd://127.0.0.1:1/"],
    ],
    ids=["metrics", "monitor", "stdio", "qemu-nbd", "proxy"],
)
def test_a_server_that_gets_no_threads_at_its_start_says_so_in_one_line(
    image: Path, tmp_path: Path, arguments: list[str]
) -> None:
    given: list[Argument] = [word.format(directory=tmp_path) for word in arguments]
    if "-f" not in given:
        given += ["-f", "raw"]
    if "--stdio" not in given:
        given += ["-k", tmp_path / "nbd.sock"]
    program = WITHOUT_THREADS.format(module="nbdserve.cli.main")
    done = run(sys.executable, "-c", program, *given, image, seconds=30, stdin="")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if " on http://" not in line]
    assert len(lines) == 1, done.stderr
    assert "no thread can be started" in lines[0]
    assert not (tmp_path / "nbd.sock").exists()
    assert not (tmp_path / "qmp").exists()


def test_an_overlay_that_gets_no_threads_at_its_start_says_so_in_one_line(tmp_path: Path) -> None:
    overlay = tmp_path / "vm.raw"
    (tmp_path / "source.img").write_bytes(bytes(MIB))
    with nbdserve("-f", "raw", tmp_path / "source.img", directory=tmp_path) as source:
        check(Path(sys.executable).with_name("nbd-overlay"), "create", "--backing", source.uri(), overlay)
        program = WITHOUT_THREADS.format(module="overlay.cli.main")
        done = run(sys.executable, "-c", program, "serve", "-k", tmp_path / "nbd.sock", overlay, seconds=30)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "no thread can be started" in done.stderr
    assert not (tmp_path / "nbd.sock").exists()
