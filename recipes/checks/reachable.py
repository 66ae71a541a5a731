"""Whether each host reaches the other where the plan says: B the disks of A, A the QEMU of B, or all that."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from recipes.checks.reach import with_port
from recipes.errors import MigrationError
from recipes.hosts.calls import HostError
from recipes.hosts.host import Host
from recipes.plans.plan import Plan

LONGER = 5.0
"""Seconds for which is listened after the other host has given up, so that its reason is the one told."""


@dataclass(frozen=True)
class Direction:
    """Where one host listens for the other; ``key`` of the plan says so."""

    key: str
    address: str
    port: int
    listens: Host
    connects: Host

    def __str__(self) -> str:
        """Return the address as it is written with its port."""
        return with_port(self.address, self.port)


async def check_reachable(plan: Plan, host_a: Host, host_b: Host) -> None:
    """Try what directions there are, one after the other, as a host may allow but one command at a time.

    Raises HostError where a host cannot be reached by us, MigrationError for one that cannot listen, or that
    the other does not reach there.
    """
    for each in directions(plan, host_a, host_b):
        await _check(each, plan.limits.connect)


def directions(plan: Plan, host_a: Host, host_b: Host) -> list[Direction]:
    """Return what goes over TCP."""
    found = []
    export = plan.export.address
    if export.socket is None:
        found.append(Direction("export.uri", export.host, export.port, host_a, host_b))
    if plan.ram_host:
        key = "channel.address" if plan.all_over_tls else "destination.migration"
        port = int(plan.way_to_b.rpartition(":")[2])
        found.append(Direction(key, plan.ram_host, port, host_b, host_a))
    return found


async def _check(way: Direction, seconds: float) -> None:
    token = secrets.token_hex(16)
    words = (way.address, str(way.port), token)
    ends = [
        asyncio.ensure_future(_end(host, end, words, limit))
        for host, end, limit in ((way.listens, "answer", seconds + LONGER), (way.connects, "ask", seconds))
    ]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        _judge(way, *ends)
    finally:
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


def _judge(way: Direction, listening: asyncio.Future[None], connecting: asyncio.Future[None]) -> None:
    """Raise what one end has failed with, and what to do about it."""
    key, there, here = way.key, way.listens.name, way.connects.name
    if listening.done():
        remedy = f"write an address of {there} and a port that nobody uses (ss -ltnp on it tells who does)"
        _require(listening, lambda error: f"{key}: {error}; {remedy}")
    let_in = f"let it in there, as in {there}'s firewall, or write another address"
    _require(connecting, lambda error: f"{key}: {here} does not reach {there} at {way} ({error}); {let_in}")


def _require(end: asyncio.Future[None], explain: Callable[[MigrationError], str]) -> None:
    """Raise what an end has failed with, explained, unless its host was not reached at all."""
    try:
        end.result()
    except HostError:
        raise
    except MigrationError as error:
        raise MigrationError(explain(error)) from error


async def _end(host: Host, end: str, words: tuple[str, ...], seconds: float) -> None:
    """Run one end; its own limit is the one that counts."""
    await host.run(*host.own("reach", end, *words, f"{seconds:g}"), limit=seconds + LONGER)
