"""The demo's guest for tests: its stage in directories of the test, and its first machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.demo.stage import Stage, prepare
from tests.support.processes import Process

MIB = 1 << 20
LAST_BYTES = 20_000
"""Of each log, which are shown."""


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a Unix socket's name, which pytest's own may not.

    It goes in the end, and what was written to logs and guests' consoles there is shown when the test fails.
    """
    path = Path(tempfile.mkdtemp(prefix="nbd-"))
    try:
        yield path
    except BaseException:
        for log in sorted((*path.rglob("*.log"), *path.rglob("*.console"))):
            print(f"{log}:", log.read_bytes()[-LAST_BYTES:].decode(errors="replace"), sep="\n")
        raise
    finally:
        shutil.rmtree(path)


@contextmanager
def staged(directory: Path, size: int, engine: str = "overlay") -> Iterator[Stage]:
    """The demo's stage: kernel, initramfs and a disk of ``size`` bytes; nothing runs yet."""
    with short_directory() as sockets:
        yield prepare(directory, sockets, size, engine=engine)


@contextmanager
def guest_running(stage: Stage) -> Iterator[Process]:
    """The guest on host A, booted and writing; its QEMU is killed in the end."""
    with Process(stage.source_qemu, stage.directory / "a.qemu.log") as machine:
        machine.wait_for(lambda: stage.guest_on_a.ready, "the guest to find its disk", seconds=60)
        yield machine


def flip(image: Path, offset: int) -> None:
    """Change one bit of the byte at ``offset`` of a file, past all locks."""
    with image.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))
