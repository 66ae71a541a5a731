"""The servers that are compared, under the same conditions.

One raw image in the page cache, writing allowed only in the rows that write, write-back caching, any number
of clients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.support import servers
from tests.support.processes import check
from tests.support.servers import Address, Server

Start = Callable[[Path, bool, Path, Address], AbstractContextManager[Server]]


@dataclass(frozen=True)
class Contender:
    """A server and how it is started: ``start(image, writable, directory, address)``."""

    name: str
    remark: str
    version: Callable[[], str]
    start: Start
    export: str = ""


def _read_only(writable: bool) -> list[str]:
    return [] if writable else ["--read-only"]


def _nbdserve(image: Path, writable: bool, directory: Path, at: Address) -> AbstractContextManager[Server]:
    return servers.nbdserve("--format=raw", *_read_only(writable), image, directory=directory, at=at)


def _qemu_nbd(aio: str) -> Start:
    def start(image: Path, writable: bool, directory: Path, at: Address) -> AbstractContextManager[Server]:
        options = ["--format=raw", "--cache=writeback", f"--aio={aio}", *_read_only(writable)]
        return servers.qemu_nbd(*options, image, directory=directory, at=at)

    return start


def _nbdkit(image: Path, writable: bool, directory: Path, at: Address) -> AbstractContextManager[Server]:
    return servers.nbdkit(*_read_only(writable), "file", image, directory=directory, at=at)


def _nbd_server(image: Path, writable: bool, directory: Path, at: Address) -> AbstractContextManager[Server]:
    return servers.nbd_server(image, directory=directory, at=at, read_only=not writable)


def _first_line(*argv: str) -> Callable[[], str]:
    return lambda: check(*argv).splitlines()[0]


OURS = Contender("nbdserve", "its defaults", _first_line(str(servers.NBDSERVE), "--version"), _nbdserve)

CONTENDERS = [
    OURS,
    Contender(
        "qemu-nbd",
        "`--persistent --shared=0 --cache=writeback --aio=threads`: its defaults, for many clients",
        _first_line("qemu-nbd", "--version"),
        _qemu_nbd("threads"),
    ),
    Contender(
        "qemu-nbd, io_uring",
        "the same with `--aio=io_uring`, its fastest for small reads",
        _first_line("qemu-nbd", "--version"),
        _qemu_nbd("io_uring"),
    ),
    Contender(
        "nbdkit",
        "its `file` plugin, 16 threads: its defaults",
        _first_line("nbdkit", "--version"),
        _nbdkit,
    ),
    Contender(
        "nbd-server",
        "4 threads: its defaults",
        lambda: check("nbd-server", "-V").split(maxsplit=2)[2].strip(),
        _nbd_server,
        export="disk",
    ),
]
