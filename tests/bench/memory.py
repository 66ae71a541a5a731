"""How much memory a server takes with one client, and with many that are idle."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.contenders import Contender, Task
from tests.bench.fio import run_fio
from tests.bench.rows import KIB4, Row
from tests.support.servers import UnixAddress, fresh_path
from tests.support.wire import Command, Wire, request

KIB = 1 << 10
BUSY = Row("4 KiB random reads, depth 64", "randread", KIB4, 64)
MOST = 40 << 20
"""Bytes that nbdserve may take with one client."""
MOST_FOR_ONE_MORE = 1 << 20
"""Bytes that one idle client more may cost."""


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a server takes."""

    contender: Contender
    with_one: int
    """With one client, after a load."""
    with_idle: int
    """With ``idle`` clients more."""
    idle: int
    answered: int
    """How many of the idle clients were answered in the end."""

    @property
    def for_one_more(self) -> float:
        """What each idle client costs."""
        return (self.with_idle - self.with_one) / self.idle


def measure_memory(
    contenders: Sequence[Contender], image: Path, directory: Path, idle: int | None = None
) -> list[Memory]:
    """Load each server with one client, then leave many idle with it; ``idle`` overrides how many."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    try:
        return [_measure(contender, image, directory, idle or contender.idle) for contender in contenders]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def _measure(contender: Contender, image: Path, directory: Path, idle: int) -> Memory:
    address = UnixAddress(fresh_path(directory, "memory", ".sock"))
    task = Task(image, writable=False, directory=directory, at=address)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contender.start(task))
        first = stack.enter_context(_connected(address, contender.export))
        run_fio(server.uri(contender.export), BUSY, 0.2)
        assert _answers(first)
        with_one = _memory_of(server.pid)
        clients = [stack.enter_context(_connected(address, contender.export)) for _ in range(idle)]
        with_idle = _memory_of(server.pid)
        answered = sum(map(_answers, clients))
    return Memory(contender, with_one, with_idle, idle, answered)


def _connected(address: UnixAddress, export: str) -> Wire:
    wire = Wire(address, seconds=30)
    wire.go(export)
    return wire


def _answers(wire: Wire) -> bool:
    """Whether a read of 512 bytes succeeds."""
    wire.send(request(Command.READ, 0, 512))
    answered = wire.simple_reply().error == 0
    return answered and len(wire.receive(512)) == 512


def _memory_of(pid: int) -> int:
    """Proportional set size of a process and its descendants in bytes: what several share counts once."""
    process = psutil.Process(pid)
    return sum(member.memory_full_info().pss for member in [process, *process.children(recursive=True)])
