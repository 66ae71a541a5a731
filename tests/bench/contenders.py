"""The servers that are compared, under the same conditions.

One raw image in the page cache, writing allowed only in the rows that write, write-back caching, any number
of clients. None flushes unless it is asked to, and no client here asks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.support import servers
from tests.support.processes import Argument, check
from tests.support.servers import Address, Server


@dataclass(frozen=True)
class Task:
    """What a server is to serve, and where. Its files lie in ``directory``."""

    image: Path
    writable: bool
    directory: Path
    at: Address
    identity: Path | None = None
    """The directory of its certificate, if it must speak TLS."""

    def options(self, read_only: Argument, *tls: Argument) -> list[Argument]:
        """The options for what is asked for: the one to forbid writing, those to require TLS."""
        return [*([] if self.writable else [read_only]), *(tls if self.identity else [])]


Running = AbstractContextManager[Server]


@dataclass(frozen=True)
class Contender:
    """A server and how it is started."""

    name: str
    remark: str
    version: Callable[[], str]
    start: Callable[[Task], Running]
    export: str = ""
    idle: int = 1000
    """How many idle clients it is given when its memory is measured."""


def _nbdserve(task: Task) -> Running:
    options = task.options("--read-only", f"--tls-certificates={task.identity}", "--tls-require")
    return servers.nbdserve("--format=raw", *options, task.image, directory=task.directory, at=task.at)


def _qemu_nbd(aio: str) -> Callable[[Task], Running]:
    def start(task: Task) -> Running:
        credentials = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={task.identity}"
        options = [
            "--format=raw",
            "--cache=writeback",
            f"--aio={aio}",
            *task.options("--read-only", "--object", credentials, "--tls-creds=tls"),
        ]
        return servers.qemu_nbd(*options, task.image, directory=task.directory, at=task.at)

    return start


def _nbdkit(task: Task) -> Running:
    options = task.options("--read-only", "--tls=require", f"--tls-certificates={task.identity}")
    return servers.nbdkit(*options, "file", task.image, directory=task.directory, at=task.at)


def _nbd_server(task: Task) -> Running:
    return servers.nbd_server(
        task.image, directory=task.directory, at=task.at, read_only=not task.writable, identity=task.identity
    )


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
        idle=100,
    ),
    Contender(
        "nbd-server",
        "4 threads: its defaults",
        lambda: check("nbd-server", "-V").split(maxsplit=2)[2].strip(),
        _nbd_server,
        export="disk",
        idle=100,
    ),
]
