"""The other host's end of a mirror, and the disk that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overlay.formats.image import State
from overlay.formats.open import open_image
from tests.support.overlays import NBD_OVERLAY, Daemon
from tests.support.processes import Argument, Process, check, wait_until
from tests.support.servers import UnixAddress, fresh_path


@dataclass(frozen=True)
class Receiver:
    """A running ``nbd-overlay receive``."""

    process: Process
    address: UnixAddress
    image: Path

    def uri(self) -> str:
        """The address that ``--mirror-writes`` takes."""
        return self.address.uri()


@contextmanager
def receiver(image: Path, socket: Path, directory: Path, *arguments: Argument) -> Iterator[Receiver]:
    """The receiver of a mirror on this socket, ready, until the block ends or it is killed."""
    pid_file = fresh_path(directory, "receive", ".pid")
    argv = [NBD_OVERLAY, "receive", image, "--socket", socket, "--pid-file", pid_file, *arguments]
    with Process(argv, fresh_path(directory, "receive", ".log")) as process:
        process.wait_for_pid_file(pid_file, 20.0)
        yield Receiver(process, UnixAddress(socket), image)
        if process.running:
            assert process.terminate(30.0) == 0, process.output()
        assert "Traceback" not in process.output(), process.output()


def held(image: Path, backing: bytes, directory: Path) -> bytes:
    """The disk that the files of a mirror are, looked at in copies of them, so that it goes on as it was."""
    copy = fresh_path(directory, "copy", ".img")
    for suffix in ("", ".map", ".redo"):
        check("cp", "--sparse=always", f"{image}{suffix}", f"{copy}{suffix}")
    check(NBD_OVERLAY, "receive", "--finish", copy)
    found = disk_of(copy, backing)
    for suffix in ("", ".map"):
        Path(f"{copy}{suffix}").unlink()
    return found


def disk_of(image: Path, backing: bytes) -> bytes:
    """All of the disk of an overlay over this backing."""
    with open_image(image) as opened:
        parts = [
            backing[run.offset : run.offset + run.length]
            if run.state is State.ABSENT
            else opened.read(run.offset, run.length)
            for run in opened.runs(0, opened.size)
        ]
    return b"".join(parts)


def wait_until_followed(daemon: Daemon, seconds: float = 60.0) -> None:
    """Return when the mirror has all that the guest has written."""

    def follows() -> bool:
        told = qmp.execute("query-overlay")["mirror"]
        return bool(told["state"] == "in-sync" and not told["lag"])

    with daemon.monitor() as qmp:
        wait_until(follows, "the mirror follows", seconds, 0.02)
