"""The source's QEMU around the cut-over: who has the guest, and how it gets its guest back.

What QEMU 7.2 does on the source, with ``pause-before-switchover`` and ``return-path`` (each is a test in
tests/vm/test_switch_over_states.py):

    state           the guest       B's QEMU dies        cont       migrate_cancel
    active          runs            it runs on           -          it runs on
    pre-switchover  stands still    stands for ever      refused    it runs at once, and B's QEMU ends
    device          stands still    it runs again        refused    it runs at once; and so may B's
    completed       has left        has left             RUNS, TOO  nothing

At ``device`` the monitor may not answer: QEMU holds its main loop while it writes what is left, and when B's
QEMU hangs that takes as long. It comes to an end when B's goes on, or dies.

So only who stands at pre-switchover needs somebody who acts, and migrate_cancel is right for that and nothing
else: at ``device`` all of the guest may be with B already, which takes it up whatever the source says then.
``migrate-continue`` at pre-switchover with B's QEMU dead lets the guest run on here as well.

A migrate_cancel in the very instant in which QEMU stops the guest for pre-switchover leaves it standing: it
waits to be told that it may go on, for ever, in state ``cancelling``, and another migrate_cancel does not
help (one of eight on 7.2, where one is sent as soon as the state is ``active``). ``migrate-continue`` does,
if it is given the state that it finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdserve.common.clock import now
from recipes.errors import MigrationError
from recipes.qemu.facts import OnA
from recipes.qemu.vm import CommandError, Vm

RESUME = 20.0
"""Seconds until the source's guest must run again after the destination has ended."""

LOOK = 0.05
"""Seconds between two looks at a state that no event announces."""

CANCELLING = 0.5
"""Seconds after which a guest that stands still while a migration is being cancelled is not about to run."""

UNDER_WAY = {"setup", "active", "pre-switchover", "device", "cancelling", "postcopy-active", "wait-unplug"}
"""States of query-migrate in which the source still tries to migrate."""

HOLDS = "pre-switchover"
"""The state of query-migrate in which the guest stands still until somebody lets it go on, there or here."""

SWITCHES = "device"
"""The state of query-migrate in which B's QEMU may get all of the guest at any instant."""

_FOUND = {HOLDS: OnA.HOLDS, SWITCHES: OnA.SWITCHES}
_AFTER = ("postmigrate", "finish-migrate")
"""States of query-status of a guest that has left."""

UNDER_WAY_ON_A = frozenset({OnA.SENDS, OnA.HOLDS, OnA.SWITCHES, OnA.STUCK})
"""Our migration has not come to an end."""

CANNOT_RUN = ("shutdown", "guest-panicked", "internal-error", "inmigrate", "suspended")
"""States of query-status to which no migration brings a guest, and out of which ``cont`` brings none."""

WANTED = ("events", "return-path", "pause-before-switchover")
"""Capabilities that the source needs."""


class HasLeftError(MigrationError):
    """The guest was sent away while it was to go on on A."""


async def guest_on_a(a: Vm) -> OnA:
    """Ask A's QEMU where the guest is. Raises MigrationError when it does not answer."""
    status = await migration_status(a)
    if status in _FOUND:
        return _FOUND[status]
    if status in UNDER_WAY:
        return OnA.SENDS
    found = await a.execute("query-status")
    # The guest changes sides in one instant; ``completed`` alone is of its arrival here, by an earlier one.
    if status == "completed" and found["status"] in _AFTER:
        return OnA.LEFT
    if found["running"]:
        return {"completed": OnA.RUNS_TOO, "": OnA.ANOTHER}.get(status, OnA.RUNS)
    return OnA.STANDS


async def resume(a: Vm, *, ours: bool = False, limit: float = RESUME) -> str:
    """Bring the source from any state of a migration back to a running guest. The destination must be dead.

    ``ours`` says that a migration which is complete now was one to that destination, and no other. Returns a
    phrase where the guest is there, and cannot run: as one that has shut down.

    Raises MigrationError when the guest does not run again within ``limit`` seconds, HasLeftError.
    """
    deadline = now() + limit
    stuck = now() + CANCELLING
    refusal = ""
    while now() < deadline:
        status = await migration_status(a)
        under_way = status in UNDER_WAY
        found = await a.execute("query-status")
        if found["running"] and not under_way:
            return ""
        if not under_way and found["status"] in CANNOT_RUN:
            return f"the guest does not run there: it is in state {found['status']}"
        if not under_way and found["status"] == "paused":
            # Somebody has told it so: a migration leaves other states, and ends them by itself.
            return "the guest is paused there, as it was"
        if not ours and await has_left(a):
            # Not to our destination, which is dead: to somebody else's, where it runs.
            raise HasLeftError("the guest has left A by another migration, so it was not told to go on")
        try:
            if status == "cancelling" and not found["running"] and now() > stuck:
                await a.execute("migrate-continue", state=status)
            await a.execute("migrate_cancel" if under_way else "cont")
        except CommandError as error:
            refusal = f": {error.reason}"
        await asyncio.sleep(LOOK)
    raise MigrationError(f"the guest is paused on A and cannot go on{refusal}")


async def has_left(a: Vm) -> bool:
    """Tell whether the source's migration is complete.

    ``completed`` alone does not say so: a guest that came here by a migration keeps that from its arrival.
    """
    if await migration_status(a) != "completed":
        return False
    return (await a.execute("query-status"))["status"] in _AFTER


async def migration_status(a: Vm) -> str:
    """Return the state that query-migrate tells; empty when there was no migration."""
    return str((await a.execute("query-migrate")).get("status", ""))


@dataclass(frozen=True)
class RamSent:
    """How far the RAM is, as A's QEMU says: its migration's state, bytes, and how often it began anew."""

    status: str
    sent: int
    missing: int
    total: int
    rounds: int


async def ram_sent(a: Vm, limit: float) -> RamSent:
    """Ask A's QEMU how far the RAM is; all zeros while it does not say so."""
    facts = await a.execute("query-migrate", limit=limit)
    ram = facts.get("ram", {})
    told = (int(ram.get(key, 0)) for key in ("transferred", "remaining", "total", "dirty-sync-count"))
    return RamSent(str(facts.get("status", "")), *told)


async def capabilities_on(vm: Vm) -> list[str]:
    """Return the migration capabilities that are switched on."""
    return [each["capability"] for each in await vm.execute("query-migrate-capabilities") if each["state"]]


async def set_capabilities(vm: Vm, names: Sequence[str]) -> None:
    """Switch these migration capabilities on."""
    wanted = [{"capability": name, "state": True} for name in names]
    await vm.execute("migrate-set-capabilities", capabilities=wanted)


async def restore_capabilities(vm: Vm, before: Sequence[str]) -> None:
    """Switch off what set_capabilities() switched on, except what was on before."""
    surplus: list[dict[str, Any]] = [
        {"capability": name, "state": False} for name in WANTED if name not in before
    ]
    if surplus:
        await vm.execute("migrate-set-capabilities", capabilities=surplus)


async def runs_on_kvm(vm: Vm) -> bool:
    """Tell whether the guest runs on KVM, and is not emulated."""
    return bool((await vm.execute("query-kvm"))["enabled"])


async def downtime_limit(vm: Vm) -> int:
    """Return for how many milliseconds the guest may stand still at the switch-over."""
    return int((await vm.execute("query-migrate-parameters"))["downtime-limit"])


async def set_downtime_limit(vm: Vm, limit: int) -> None:
    """Let the guest stand still for so many milliseconds; also while it is being sent."""
    await vm.call("migrate-set-parameters", {"downtime-limit": limit})
