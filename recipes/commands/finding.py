"""What there is of a migration whose guest is on B, found again before anything is done about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from nbdserve.common.errors import ConnectError, UsageError
from recipes.channel import carriers
from recipes.connections.monitors import monitor_of
from recipes.engines.choice import engine_for
from recipes.engines.overlay_engine import monitor_name
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.images import image_facts
from recipes.migrate.decide import Action, Wish, decide
from recipes.migrate.journal import Journal, actor, names, of_destination, usable_name
from recipes.migrate.leftovers import any_holds_something
from recipes.migrate.progress import Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Disk, Phase, Role, State
from recipes.plans.by_hand import asking, cancelling
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.plans.reaching import find_commands, hosts, monitor_b, source_monitor
from recipes.processes.children import Children
from recipes.qemu.facts import Facts, OnA, OnB
from recipes.qemu.source import HOLDS, guest_on_a, has_left, migration_status
from recipes.qemu.vm import EndedVm, Vm, connect, nobody_listens


async def found(
    journal: Journal, plan: Plan, report: Report, stack: AsyncExitStack, *, again: str, sure: bool
) -> Migration:
    """Find everything that there is of the migration, before anything is done, and write down what it is."""
    complete = journal.state is not None and journal.state.complete
    places = await stack.enter_async_context(hosts(plan))
    plan, places = await find_commands(plan, *places, sure=False)
    a = await source(plan, places[0], report, sure=sure, complete=complete)
    stack.push_async_callback(a.disconnect)
    b = await destination(plan, places[1], a)
    if b:
        stack.push_async_callback(b.disconnect)
    disks = [await look_at(plan, disk, places[1], b, journal.state) for disk in plan.disks]
    if not sure and journal.state is not None:
        await refuse_unless_on_b(journal.state, a, b, places[1])
    state = found_on_b(journal, plan, disks, again)
    journal.held = True
    journal.append(state)
    children = await stack.enter_async_context(Children())
    m = Migration(journal, places, report, children, None, a, owned=False)
    stack.push_async_callback(m.close)
    m.b = b
    m.no_longer_need("A's QEMU")
    await take_over(m)
    journal.held = False
    await account_for(m)
    m.enter(state.phase)
    return m


async def refuse_unless_on_b(state: State, a: Vm, b: Vm | None, host_b: Host) -> None:
    """Raise MigrationError unless what is known of the migration, and what is found, say that it is to be
    finished: one that was taken back is not, whatever its image on B still holds."""
    on_a = await guest_on_a(a) if a.connected else OnA.GONE
    on_b = OnB.HAS_GUEST
    if b is None:
        on_b = OnB.STOPPED if await any_holds_something(host_b, state) else OnB.NONE
    decision = decide(state.phase, Wish.GO_ON, Facts(on_a, on_b))
    if state.phase is not Phase.DONE and decision.action is not Action.FINISH:
        raise MigrationError(
            f"migration {state.name} ({state.phase.value}) is not to be finished: see nbd-migrate status "
            f"{state.name}; if its guest has been migrated to B since, by hand: nbd-migrate cleanup --force "
            f"{state.name}, and then this again"
        )


async def source(plan: Plan, host: Host, report: Report, *, sure: bool, complete: bool) -> Vm:
    """Return A's QEMU, whose guest has left, or has ended; MigrationError when the guest is there.

    Where the disk is complete nothing is needed of A, which may be away for good.
    """
    try:
        a = await source_monitor(plan, host)
    except ConnectError as error:
        if complete:
            report.note(f"A's QEMU was not ended, if it is still there: {error}")
        elif not nobody_listens(error):
            # Who is connected may be a run that still goes on; a host that is away may have the guest.
            raise
        return EndedVm("A's QEMU")
    try:
        if sure or await has_left(a):
            return a
        state, migration = (await a.execute("query-status"))["status"], await migration_status(a)
    except BaseException:
        await a.disconnect()
        raise
    await a.disconnect()
    remedy = "run the plan again"
    if migration == HOLDS:
        remedy = f"it stands still before the switch-over, and goes on with: {cancelling(plan.source)}"
    raise MigrationError(f"the guest is on A, in state {state}, and there is nothing to finish: {remedy}")


async def destination(plan: Plan, host: Host, a: Vm) -> Vm | None:
    """Return B's QEMU, which has the guest; None when it has ended.

    Raises MigrationError when it waits for the guest.
    """
    limits = plan.limits
    where = monitor_b(plan, host)
    try:
        b = await connect("B's QEMU", where, limit=limits.connect, command_limit=limits.command)
    except ConnectError as error:
        if not nobody_listens(error):
            raise
        return None
    try:
        waits = (await b.execute("query-status"))["status"] == "inmigrate"
    except BaseException:
        await b.disconnect()
        raise
    if waits:
        await b.disconnect()
        if a.connected:
            raise MigrationError(
                "A's QEMU has sent its guest, and B's still waits for one: there is nothing to finish yet"
            )
        quit_b = asking(plan.destination, "quit")
        raise MigrationError(
            "the guest never came to B, and A's QEMU has ended: there is nothing to finish; end B's QEMU "
            f"with {quit_b}, and start the guest on A"
        )
    return b


def journal_of(plan: Plan) -> Journal:
    """Take over the journal of the run of a plan; where there is none, as another version ran it, begin one.

    Raises JournalBusyError when another process is at work.
    """
    found = sorted(of_destination(plan), key=lambda state: (not state.over, state.time))
    for state in found:
        if actor(state.name):
            # Raises, as somebody is at work.
            return Journal.take_over(state.name)
    if found:
        return Journal.take_over(found[-1].name)
    stem = usable_name(Path(plan.disks[0].image).stem)
    taken = names()
    free = (each for each in chain([stem], (f"{stem[:30]}-{n}" for n in count(2))) if each not in taken)
    return Journal.begin(next(free))


def found_on_b(journal: Journal, plan: Plan, disks: Sequence[Disk], again: str) -> State:
    """Return the state of a migration whose guest is found on B."""
    known = journal.state or State(journal.directory.name, plan)
    return replace(
        known,
        plan=plan.settled,
        phase=Phase.COMPLETE if all(disk.complete for disk in disks) else Phase.ARRIVED,
        disks=tuple(with_account(each, known) for each in disks),
        arrived=known.arrived or time.time(),
        made=(),
        finish=again,
    )


def with_account(disk: Disk, known: State) -> Disk:
    """Return a disk as it was found, with what the journal has of it, and of how it became complete."""
    before = next((each for each in known.disks if each.target == disk.target), None)
    if before is None:
        return disk
    disk = replace(disk, file=before.file, moved=before.moved)
    if not disk.complete:
        return disk
    return replace(disk, seeded=before.seeded, verified=before.verified, written=before.written)


async def account_for(m: Migration) -> None:
    """Write down how those disks have become complete of which the command died before it had done so."""
    for disk in m.disks:
        known = m.state.disk(disk)
        is_told = known.seeded or known.verified or known.written
        if known.complete and not is_told and disk.drive in m.overlay_monitors:
            # It is of no other account.
            with suppress(MigrationError):
                await engine_for(m).account(m, disk)


async def look_at(
    plan: Plan, disk: PlannedDisk, host: Host, b: Vm | None, state: State | None = None
) -> Disk:
    """See how complete B's image of a disk is; ``state`` is what is known of the migration."""
    image, limit = disk.target, plan.limits.command
    if not await host.test("-e", image, limit):
        if b:
            raise MigrationError(
                f"there is no {image} on B, where the guest runs on it: end neither B's QEMU nor "
                "nbd-overlay, and give the file its name back"
            )
        raise MigrationError(
            f"there is no {image} on B, so there is nothing to finish; is it the right plan?"
        )
    facts = await image_facts(host, image, limit)
    made_by = "qemu" if facts["format"] == "qed" else "overlay"
    if made_by != plan.destination.engine:
        raise UsageError(
            f"{image} on B is of engine {made_by}: give --engine {made_by}, as the run was given"
        )
    size, complete = int(facts["virtual-size"]), "backing-filename" not in facts
    if disk.on_device and complete:
        if not b and not (state and state.arrived):
            raise MigrationError(
                f"there is no overlay on {image} on B, and the guest is not known to have been there, so "
                "there is nothing to finish; is it the right plan?"
            )
        # The device may be larger.
        known = [each.size for each in state.disks if each.target == image] if state else []
        size = known[0] if known else size
    return Disk(disk.image, image, size, complete=complete)


async def take_over(m: Migration) -> None:
    """Find what the run has left."""
    try:
        await m.adopt(Role.SERVER)
        await m.adopt(Role.FENCE)
    except MigrationError:
        # A complete disk needs nothing of A, which may be away for good: the last step says so.
        if not m.complete:
            raise
    for role in carriers.ROLES:
        await m.adopt(role)
    for disk in m.disks:
        await m.adopt(Role.OVERLAY, disk.drive)
    if m.b:
        await m.adopt_known(Role.QEMU)
    limits = m.plan.limits
    for disk in m.disks:
        try:
            # Also without a pid file.
            m.overlay_monitors[disk.drive] = await connect(
                *(monitor_name(m, disk), monitor_of(m.host_b, disk.overlay_monitor)),
                limit=limits.connect,
                command_limit=limits.command,
            )
        except ConnectError:
            if m.overlay(disk):
                raise
