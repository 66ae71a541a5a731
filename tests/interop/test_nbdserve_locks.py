"""Who may open an image that somebody else has open: nbdserve minds QEMU's locks as qemu-nbd does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import NotReadyError, Process, check, run
from tests.support.servers import NBDSERVE, UnixAddress, fresh_path, nbdserve, qemu_nbd

MODES = ("read-write", "read-only")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


def _read_only(mode: str) -> list[str]:
    return ["--read-only"] if mode == "read-only" else []


@contextmanager
def guest(image: Path, mode: str, directory: Path) -> Iterator[Process]:
    """A QEMU that has the image as its disk, with the guest not started yet."""
    monitor = UnixAddress(fresh_path(directory, "qmp", ".sock"))
    read_only = "on" if mode == "read-only" else "off"
    argv = [
        *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-accel", "tcg", "-m", "64"),
        *("-qmp", f"unix:{monitor.path},server=on,wait=off"),
        *("-blockdev", f"driver=file,node-name=file,filename={image}"),
        *("-blockdev", f"driver=raw,node-name=disk,file=file,read-only={read_only}"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ]
    with Process(argv, fresh_path(directory, "qemu", ".log")) as process:
        process.wait_for(lambda: answers(monitor), "QEMU answers a command", seconds=30)
        yield process


def answers(monitor: UnixAddress) -> bool:
    """Whether a QEMU has come so far that it answers. (It greets sooner, before it has opened its disks.)"""
    try:
        with monitor.connect() as client, client.makefile() as lines:
            client.sendall(b'{"execute": "qmp_capabilities"} {"execute": "query-status"}')
            return any("prelaunch" in line for line in lines)
    except OSError:
        return False


Start = Callable[[Path, str, Path], AbstractContextManager[object]]


def _qemu_nbd(image: Path, mode: str, directory: Path) -> AbstractContextManager[object]:
    return qemu_nbd("-f", "raw", *_read_only(mode), image, directory=directory)


def _nbdserve(image: Path, mode: str, directory: Path) -> AbstractContextManager[object]:
    return nbdserve("-f", "raw", *_read_only(mode), image, directory=directory)


OTHERS: dict[str, Start] = {"guest": guest, "qemu-nbd": _qemu_nbd}


def opens(start: Start, image: Path, mode: str, directory: Path) -> bool:
    """Whether a program gets the image; if not, it must be for the locks."""
    try:
        with start(image, mode, directory):
            return True
    except NotReadyError as refused:
        if "lock" in str(refused) or "in use" in str(refused):
            return False
        raise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("held", MODES)
@pytest.mark.parametrize("holder", OTHERS)
def test_nbdserve_is_refused_where_qemu_nbd_is_refused(
    image: Path, tmp_path: Path, holder: str, held: str, mode: str
) -> None:
    with OTHERS[holder](image, held, tmp_path):
        assert opens(_nbdserve, image, mode, tmp_path) is opens(_qemu_nbd, image, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("held", MODES)
@pytest.mark.parametrize("other", OTHERS)
def test_others_are_refused_an_image_of_nbdserve_as_they_are_one_of_qemu_nbd(
    image: Path, tmp_path: Path, other: str, held: str, mode: str
) -> None:
    with _qemu_nbd(image, held, tmp_path):
        expected = opens(OTHERS[other], image, mode, tmp_path)
    with _nbdserve(image, held, tmp_path):
        assert opens(OTHERS[other], image, mode, tmp_path) is expected


def test_a_refusal_is_one_line_that_says_what_to_do(image: Path, tmp_path: Path) -> None:
    with guest(image, "read-write", tmp_path):
        done = run(NBDSERVE, "-f", "raw", "-k", tmp_path / "nbd.sock", image, seconds=10)
    assert done.returncode == 1
    assert done.stderr.startswith(f"nbdserve: {image}: ")
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("fenced", [False, True])
def test_a_fence_keeps_writers_out_and_lets_readers_in(image: Path, tmp_path: Path, fenced: bool) -> None:
    options = ["--fence"] if fenced else []
    with nbdserve("-f", "raw", "-r", *options, image, directory=tmp_path):
        for start in OTHERS.values():
            assert opens(start, image, "read-only", tmp_path)
            assert opens(start, image, "read-write", tmp_path) is not fenced
        writing = run("qemu-io", "-f", "raw", "-c", "write 0 512", image)
        assert (writing.returncode != 0) is fenced
        check("qemu-img", "info", image)
    assert opens(guest, image, "read-write", tmp_path), "the fence outlived the server"


def test_locks_go_when_the_server_is_killed(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--fence", "-r", image, directory=tmp_path) as server:
        server.process.kill()
        check("qemu-io", "-f", "raw", "-c", "write 0 512", image)


def test_one_image_twice_in_one_server_is_no_conflict(image: Path, tmp_path: Path) -> None:
    exports = ["--export", f"a={image},format=raw", "--export", f"b={image},format=raw,read-only"]
    with nbdserve(*exports, directory=tmp_path) as server:
        check("qemu-io", "-f", "raw", "-c", "write -P 7 0 512", server.uri("a"))
        check("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 512", server.uri("b"))
