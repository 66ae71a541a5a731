"""Unix sockets: one server's each, and short."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import Argument, Process, check, is_alive, run, wait_until
from tests.support.servers import NBDSERVE, UnixAddress, nbdserve, qemu_nbd

BIN = Path(sys.executable).parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


@pytest.mark.parametrize("option", ["-k", "--qmp=unix:"])
def test_a_second_server_at_a_path_is_refused_and_told_who_listens(
    image: Path, tmp_path: Path, option: str
) -> None:
    other = tmp_path / "other.img"
    random_disk(other, MIB)
    path = tmp_path / "path"
    first: list[Argument] = ["-k", path] if option == "-k" else [f"{option}{path}", "-k", tmp_path / "a"]
    second: list[Argument] = ["-k", path] if option == "-k" else [f"{option}{path}", "-k", tmp_path / "b"]
    pid_file = tmp_path / "pid"
    with Process([NBDSERVE, "-f", "raw", *first, "--pid-file", pid_file, image], tmp_path / "log") as server:
        server.wait_for_pid_file(pid_file)
        done = run(NBDSERVE, "-f", "raw", *second, other, seconds=10)
        assert done.returncode == 1
        why = f"process {server.pid} listens there: end it first, or choose another path"
        assert done.stderr.splitlines()[-1] == f"nbdserve: unix:{path}: {why}"
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert server.terminate() == 0
        assert not path.exists()


def test_the_socket_of_another_program_is_not_taken(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    random_disk(other, MIB)
    with qemu_nbd("-f", "raw", other, directory=tmp_path) as stock:
        assert isinstance(stock.address, UnixAddress)
        done = run(NBDSERVE, "-f", "raw", "-k", stock.address.path, image, seconds=10)
        assert (done.returncode, f"process {stock.pid} listens" in done.stderr) == (1, True)
        assert check("nbdinfo", "--size", stock.uri()) == f"{MIB}\n"


def test_a_server_whose_queue_is_full_is_a_living_one(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "path"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        done = run(NBDSERVE, "-f", "raw", "-k", path, image, seconds=10)
        assert done.stderr.endswith("another process listens there: end it first, or choose another path\n")
        assert done.returncode == 1
        assert path.is_socket()


def one_is_left(servers: list[Process]) -> Process:
    """The only one that runs, when all others have ended."""
    wait_until(lambda: sum(server.running for server in servers) <= 1, "all but one are refused", 30)
    (left,) = [server for server in servers if server.running]
    left.wait_for_line("serving")
    return left


def test_of_servers_that_take_a_dead_sockets_place_at_once_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "path"
    for number in range(4):
        random_disk(tmp_path / f"{number}.img", MIB)
    for turn in range(3):
        with socket.socket(socket.AF_UNIX) as dead, ExitStack() as stack:
            dead.bind(str(path))
            lines: list[list[Argument]] = [
                [NBDSERVE, "-f", "raw", "-k", path, tmp_path / f"{number}.img"] for number in range(4)
            ]
            servers = [
                stack.enter_context(Process(line, tmp_path / f"{turn}-{number}.log"))
                for number, line in enumerate(lines)
            ]
            left = one_is_left(servers)
            assert check("nbdinfo", "--size", UnixAddress(path).uri()) == f"{MIB}\n"
            assert left.terminate() == 0
            assert not path.exists()


def test_at_the_end_a_socket_that_somebody_else_has_made_stays(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        assert isinstance(server.address, UnixAddress)
        path = server.address.path
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            assert server.process.terminate() == 0
            assert path.is_socket()


LONG = "/" + "x" * 107
SHORT = "a shorter one, or one that is relative to the working directory"
LINES: list[tuple[list[str], str]] = [
    (["nbdserve", "-f", "raw", "-k", LONG, "disk.img"], "--socket"),
    (["nbdserve", "-f", "raw", "--qmp", f"unix:{LONG}", "disk.img"], "--qmp"),
    (["nbd-overlay", "serve", "disk.img", "-k", LONG], "--socket"),
    (["nbd-overlay", "serve", "disk.img", "-k", "s", "--qmp", f"unix:{LONG}"], "--qmp"),
    (["nbd-overlay", "status", "--qmp", f"unix:{LONG}"], "--qmp"),
    (["nbd-overlay", "wait", "--qmp", f"unix:{LONG}"], "--qmp"),
    (["nbd-migrate", "qmp", LONG, "query-status"], "MONITOR"),
    (["nbd-migrate", "pivot", "--qmp", LONG, "--node", "disk0", "disk.img"], "--qmp"),
]


@pytest.mark.parametrize(("line", "option"), LINES, ids=lambda value: " ".join(value)[:30])
@pytest.mark.sampled(3)
def test_a_path_that_is_too_long_is_refused_with_the_limit(
    image: Path, tmp_path: Path, line: list[str], option: str
) -> None:
    program, *arguments = line
    done = run(BIN / program, *arguments, cwd=tmp_path, seconds=10)
    why = f"{LONG} has 108 bytes, a Unix socket's path at most 107: choose {SHORT}"
    assert (done.returncode, done.stderr) == (2, f"{program}: {option}: {why}\n")


@pytest.mark.parametrize("uri", ["nbd+unix:///x?socket={}", "nbd:unix:{}"])
@pytest.mark.parametrize(
    "words",
    [
        ["nbdserve", "{}"],
        ["nbdserve", "--listen", "{}", "disk.img"],
        ["nbd-overlay", "create", "new.img", "--backing", "{}"],
        ["nbd-migrate", "probe", "{}"],
    ],
    ids=" ".join,
)
def test_an_address_with_a_path_that_is_too_long_is_refused_with_the_limit(
    image: Path, tmp_path: Path, words: list[str], uri: str
) -> None:
    program, *arguments = [word.format(uri.format(LONG)) for word in words]
    done = run(BIN / program, *arguments, cwd=tmp_path, seconds=10)
    assert done.returncode == 2
    assert re.search("108 bytes.*107", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def deep(image: Path) -> Path:
    """A directory whose own path is longer than that of a Unix socket may be, with an image."""
    directory = image.parent
    while len(str(directory)) < 200:
        directory /= "d" * 50
    directory.mkdir(parents=True)
    random_disk(directory / "disk.img", MIB)
    return directory


@pytest.mark.parametrize("fork", [False, True])
def test_a_relative_socket_in_a_deep_directory_works(deep: Path, fork: bool) -> None:
    options: list[Argument] = ["-f", "raw", "-k", "sock", "--qmp", "unix:qmp", "--pid-file", "pid"]
    if fork:
        check(NBDSERVE, *options, "--fork", "disk.img", cwd=deep)
        pid = int((deep / "pid").read_text())
        try:
            assert check("nbdinfo", "--size", "nbd+unix:///?socket=sock", cwd=deep) == f"{MIB}\n"
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "the daemon has ended")
    else:
        with Process([NBDSERVE, *options, "disk.img"], deep / "log", cwd=deep) as server:
            server.wait_for_pid_file(deep / "pid")
            assert check("nbdinfo", "--size", "nbd+unix:///?socket=sock", cwd=deep) == f"{MIB}\n"
            proxy: list[Argument] = [
                NBDSERVE,
                "-k",
                "proxy",
                "--pid-file",
                "proxy.pid",
                "nbd+unix:///?socket=sock",
            ]
            with Process(proxy, deep / "proxy.log", cwd=deep) as second:
                second.wait_for_pid_file(deep / "proxy.pid")
                assert check("nbdinfo", "--size", "nbd+unix:///?socket=proxy", cwd=deep) == f"{MIB}\n"
            assert server.terminate() == 0
    assert not (deep / "sock").exists()
    assert not (deep / "qmp").exists()


def test_an_overlay_in_a_deep_directory_is_served_at_a_relative_socket(deep: Path) -> None:
    with nbdserve("-f", "raw", "-r", deep / "disk.img", directory=deep.parents[3]) as source:
        program = BIN / "nbd-overlay"
        check(program, "create", "--backing", source.uri(), "new.img", cwd=deep)
        argv: list[Argument] = [program, "serve", "new.img", "-k", "sock", "--qmp", "unix:qmp", "--stream"]
        argv += ["--pid-file", "pid"]
        with Process(argv, deep / "log", cwd=deep) as daemon:
            daemon.wait_for_pid_file(deep / "pid")
            check(program, "wait", "--qmp", "unix:qmp", cwd=deep)
            assert check("nbdinfo", "--size", "nbd+unix:///?socket=sock", cwd=deep) == f"{MIB}\n"
            assert daemon.terminate() == 0
    assert (deep / "new.img").read_bytes() == (deep / "disk.img").read_bytes()


def test_a_relative_backing_whose_absolute_path_is_too_long_is_refused(deep: Path) -> None:
    done = run(
        BIN / "nbd-overlay",
        "create",
        "--backing",
        "nbd+unix:///?socket=sock",
        "new.img",
        cwd=deep,
        seconds=10,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nbd-overlay: --backing, absolute as the image needs it: ")
    assert "107" in done.stderr
    assert not (deep / "new.img").exists()


@pytest.mark.parametrize("length", [60, 150])
def test_a_qemu_nbd_child_is_reached_however_long_the_path_of_temporary_files_is(
    tmp_path: Path, length: int
) -> None:
    place = tmp_path / ("t" * length)
    place.mkdir()
    image = tmp_path / "disk.qcow2"
    check("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with nbdserve("-f", "qcow2", image, directory=tmp_path, env={"TMPDIR": str(place)}) as server:
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
