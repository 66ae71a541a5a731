"""Step 4: the RAM follows, the guest changes sides, and A is kept from ever running it again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from nbdserve.common.clock import now
from nbdserve.common.errors import UsageError
from nbdserve.qmp.client import EventListener
from recipes.channel import carriers, through_qemu, tls
from recipes.checks.disk_nodes import disk_nodes
from recipes.errors import MigrationError
from recipes.fencing.source_images import note_places, put_away, start_fence
from recipes.hosts.images import FilesLater, files_at
from recipes.hosts.interruption import together, undisturbed
from recipes.hosts.quoting import listed
from recipes.migrate.progress import Moment, RamProgress
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Arrival, Phase, Role
from recipes.plans.disks import PlannedDisk
from recipes.precopy.rounds import Rounds
from recipes.qemu.destination import ARRIVE
from recipes.qemu.devices import check_jobs, devices_of, difference
from recipes.qemu.images import RAW
from recipes.qemu.source import LOOK, WANTED, ram_sent, set_capabilities
from recipes.qemu.vm import CommandError, RefusedGuestError, Vm, VmGoneError, VmSilentError
from recipes.running import speed
from recipes.running.downtime import Downtime, short_downtime
from recipes.running.estimate import Estimate
from recipes.steps import advice
from recipes.steps.export import serve_files

NOT_OURS = ("inmigrate", "prelaunch")
"""States of query-status of a QEMU in which nothing has run yet."""

RAM_LOOK = 0.5
"""Seconds between two looks how far the RAM is."""

PARTING = 3.0
"""Seconds in which a QEMU answers, or ends, that is not kept waiting by anybody."""

PAUSED = "paused"
"""The state of query-status of a guest that was told to stop; an error brings another one."""


async def cut_over(m: Migration, rounds: Rounds | None = None) -> str:
    """Step 4: migrate; when this returns, the guest runs on B and the children live on without us.

    ``rounds`` is what has copied the disks before: what is out of date by then is forgotten on B while the
    guest stands still, before A's QEMU is told to continue (precopy/tracker.py).
    """
    a, b = m.a, m.monitor_b
    # Without return-path the source would report success even if the destination could not load the guest.
    await set_capabilities(b, ("events", "return-path"))
    await set_capabilities(a, WANTED)
    await tls.send_ram(m)
    downtime = await short_downtime(m)
    # One that is kept waiting by who has connected to it would keep A's waiting, and its guest with it.
    async with parting_silent_ones(m):
        await m.during(b.execute("query-status"), m.plan.limits.command, "B's QEMU")
    # While the guest stands still nothing is started whose answer is waited for.
    async with aclosing(FilesLater(m.host_a, [disk.image for disk in m.disks])) as files:
        with a.events("MIGRATION") as news:
            await send_guest(m, rounds, files, news, downtime)
            arrived = await switch_over(m, news)
    await arrive(m, arrived)
    await fence_source(m)
    m.guard.dismiss()
    if rounds:
        await rounds.tracker.leave()
    await tls.forget_ram(m)
    arrival = m.state.arrival
    if arrival is None:
        return "the guest runs on B"
    sent = f"{arrival.ram_bytes} bytes of RAM in {arrival.total_ms} ms"
    stood_still = f"{sent}; the guest stood still for {arrival.downtime_ms} ms"
    if (expected := m.state.prediction) is None:
        return stood_still
    return (
        f"{stood_still}, {expected.added * 1000:.0f} ms of that for the last bitmap; {expected.missing} "
        f"bytes of the disk are left for the window, predicted to take {expected.seconds:.1f} s"
    )


async def send_guest(
    m: Migration, rounds: Rounds | None, files: FilesLater, news: EventListener, downtime: Downtime | None
) -> None:
    """Have A's QEMU send the guest, until it is told to switch over; ``news`` is of its migration.

    Raises MigrationError: then the guest goes on on A, or can.
    """
    a = m.a
    limit = m.plan.limits.command
    await check_disks(m, files_at(m.host_a, [disk.image for disk in m.disks], limit))
    # Unless QEMU refuses it, the guest may be under way from here on, whatever becomes of the answer.
    m.enter(Phase.MIGRATE)
    try:
        await a.execute("migrate", uri=carriers.ram_uri(m))
    except CommandError:
        m.enter(Phase.LAUNCH)
        raise
    async with parting_silent_ones(m):
        await m.during(reaching("active", a, news), limit, "A's QEMU connecting to B's")
    await as_long_as_bytes_move(m, reaching("pre-switchover", a, news), "sending the RAM", downtime)
    m.report.moment(Moment.SWITCHOVER)
    m.refuse_the_dead()
    # Who may have the guest in a moment must not end with us: the QEMUs come to an end by themselves. Beside
    # the rest, as that takes as long for one who has to wake up; after a failure the way back ends them all.
    told, _ = await together([last_bitmap(m, rounds, files.ask(limit)), released(m)])
    # From here on only the two QEMUs count: a server that dies is started again while streaming.
    carry = m.roles(Role.SERVER, Role.OVERLAY, *carriers.ROLES)
    for name in ("the guard", *(m.called(*each) for each in carry)):
        m.no_longer_need(name)
    # The guest stands still, so no disk is waited for. Where a power failure takes this with it, what is
    # found on A and on B says the same.
    m.enter(Phase.SWITCH_OVER, sync=False, **told)
    await a.execute("migrate-continue", state="pre-switchover")


async def released(m: Migration) -> Mapping[str, Any]:
    """Let what was started live on without us; that is nothing for the journal."""
    await m.release_for_sure()
    return {}


async def last_bitmap(m: Migration, rounds: Rounds | None, files: Awaitable[list[str]]) -> Mapping[str, Any]:
    """See that B has nothing that is out of date, and reads the disks that the guest has; return what the
    journal is told. The guest stands still meanwhile.
    """
    if rounds is None:
        await check_disks(m, files)
        return {}
    told: list[Mapping[str, Any] | None] = await together([rounds.finish(), check_disks(m, files)])
    return told[0] or {}


async def check_disks(m: Migration, asked: Awaitable[list[str]]) -> None:
    """Raise MigrationError where the guest has other disks by now than those that B reads, or other devices
    than B's QEMU. ``asked`` is which files A has, as files_at() says.

    After a snapshot was taken of a disk, what the guest writes goes elsewhere, as with a job's next image.
    """
    state = m.state
    try:
        nodes, devices, files, _ = await asyncio.gather(
            disk_nodes(m.plan, m.a), devices_of(m.a), asked, check_jobs(m.a)
        )
    except UsageError as error:
        raise MigrationError(f"the guest's disks have changed since step 1: {error}") from error
    for disk, node, file in zip(m.disks, nodes, files, strict=True):
        known = state.disk(disk)
        if node.size != known.size:
            change = f"{disk.image} has {node.size} bytes in A's QEMU, and had {known.size}: run again"
            raise MigrationError(f"the guest's disks have changed since step 1: {change}")
        if change := file_change(disk, known.file, file):
            raise MigrationError(f"the guest's disks have changed since step 1: {change}")
    if state.devices and (change := difference(state.devices, devices)):
        raise MigrationError(
            f"the guest's devices have changed since step 1: {change}, and B's QEMU was started as it was "
            "before: undo it, or write the plan as A's QEMU is now (nbd-migrate plan does), and run again"
        )


def file_change(disk: PlannedDisk, before: str, now: str) -> str:
    """Return what has become of a disk's file on A that B reads by its name, or nothing."""
    if not before or before == now:
        return ""
    if not now:
        return f"there is no {disk.image} on A any more: give the file that A's QEMU has open its name back"
    (*is_before, size_before), (*is_now, size) = before.split(), now.split()
    if is_before != is_now:
        return f"{disk.image} on A is another file: give the one that A's QEMU has open its name back"
    # Other formats grow as their guests write.
    if disk.format != RAW or size == size_before:
        return ""
    return (
        f"{disk.image} on A has {size} bytes and had {size_before}, of which A's QEMU knows nothing: give it "
        f"its length back (truncate --size {size_before} {disk.image}; what was cut off is lost)"
    )


@asynccontextmanager
async def parting_silent_ones(m: Migration) -> AsyncIterator[None]:
    """End B's QEMU when what the caller does fails, or is interrupted, and neither of the two says anything.

    Then B's (7.2, 10.0) waits for the handshake of who has connected before A's, which waits for B's, with
    its guest. B's has nothing of that, as A's was not yet told to switch over.
    """
    try:
        yield
    except (MigrationError, asyncio.CancelledError) as error:
        if not m.plan.ram_over_tls or not await undisturbed(is_silent(m.monitor_b)):
            raise
        a_is_silent = await undisturbed(is_silent(m.a))
        if a_is_silent and m.qemu:
            with suppress(MigrationError):
                await undisturbed(m.qemu.stop(PARTING))
        if isinstance(error, MigrationError):
            where = m.plan.destination.migration
            raise MigrationError(f"{error}; is somebody else connected to {where}?") from error
        raise


async def is_silent(vm: Vm) -> bool:
    """Tell whether a QEMU that is there does not answer."""
    try:
        await vm.execute("query-status", limit=PARTING)
    except VmSilentError:
        return True
    except MigrationError:
        return False
    return False


async def reaching(state: str, a: Vm, news: EventListener) -> None:
    """Wait until the source's migration is in this state; MigrationError when it fails instead."""
    while True:
        # The time limit is the caller's.
        event = await a.next_event(news, float("inf"), state)
        if event["status"] == state:
            return
        if event["status"] in ("failed", "cancelled"):
            reason = (await a.execute("query-migrate")).get("error-desc", "the other side gave up")
            raise RefusedGuestError(f"A's QEMU says that the migration is {event['status']}: {reason}")


async def as_long_as_bytes_move(
    m: Migration, work: Coroutine[Any, Any, None], what: str, downtime: Downtime | None = None
) -> None:
    """Wait for ``work`` as long as A's QEMU sends something, and everything needed lives.

    Raises MigrationError: whose end it was, or that nothing has moved for ``limits.silence``.
    """
    waits = [asyncio.ensure_future(work), asyncio.ensure_future(silence(m, downtime))]
    try:
        await m.during(asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED), math.inf, what)
        if not waits[0].done():
            waits[1].result()
            limit = m.plan.limits.silence
            raise MigrationError(f"{what} has come to a halt: no byte has moved for {limit:g} s")
        waits[0].result()
    finally:
        for each in waits:
            each.cancel()


async def silence(m: Migration, downtime: Downtime | None) -> None:
    """Follow how A's QEMU sends its guest; return when nothing has moved for ``limits.silence``.

    ``downtime`` is how long the guest may stand still, until it does.
    """
    limit, seen, moved, estimate = m.plan.limits.silence, None, now(), Estimate()
    # Once the guest stands still nothing else is done.
    tells = m.state.phase is Phase.MIGRATE
    while now() - moved < limit:
        # Not at once: at the switch-over it has something else to do.
        await asyncio.sleep(RAM_LOOK)
        # While it writes what is left QEMU answers nobody.
        with suppress(VmSilentError):
            ram = await ram_sent(m.a, limit)
            if ram != seen:
                seen, moved = ram, now()
            if downtime:
                await downtime.follow(ram.rounds)
            estimate.note(now(), ram.sent, ram.missing)
            if tells and ram.sent:
                progress = RamProgress(ram.sent, ram.missing, estimate.rate, ram.rounds)
                m.report.ram(progress)
                m.journal.note_progress(ram=progress)
        # What is asked of the stream counts once that begins.
        before = m.state
        if tells and (asked := speed.write_down(m)) and not speed.take(m.journal.directory, asked):
            speed.take_back(m, before)


async def switch_over(m: Migration, news: EventListener) -> Arrival | None:
    """Wait for the source's ``completed``: from then on the guest is B's. Return what A's QEMU says of it."""
    try:
        await as_long_as_bytes_move(m, reaching("completed", m.a, news), "the switch-over")
        facts = await m.a.execute("query-migrate")
        return Arrival(facts["downtime"], facts["total-time"], facts["ram"]["transferred"])
    except MigrationError:
        # A source that died after everything had been sent did not live to say so, and cannot go on either.
        if m.a.connected or not await is_there(m.monitor_b):
            raise
        m.report.note("A's QEMU ended during the switch-over, but the guest had arrived on B")
    return None


async def arrive(m: Migration, arrival: Arrival | None) -> None:
    """Note that the guest is B's, and let what carries it live on without us."""
    m.enter(Phase.ARRIVED, arrived=time.time(), arrival=arrival, made=(), disks=m.state.with_moved())
    m.no_longer_need("A's QEMU")
    await m.during(arriving(m.monitor_b), ARRIVE, "the guest's start on B")
    m.report.moment(Moment.ARRIVED)
    await tell_if_paused(m)


async def tell_if_paused(m: Migration) -> None:
    """Say of a guest that somebody had paused that it is so on B, too: nobody else lets it go on."""
    with suppress(MigrationError):
        if (await m.monitor_b.execute("query-status"))["status"] == PAUSED:
            m.report.note(advice.paused(m.state))
            m.record(paused=True)


async def is_there(b: Vm) -> bool:
    """Tell whether the guest is on B, or will be within ARRIVE seconds."""
    try:
        async with asyncio.timeout(ARRIVE):
            await arriving(b)
    except (MigrationError, TimeoutError):
        return False
    return True


async def arriving(b: Vm) -> None:
    """Wait until the guest is there; it may not run, when its first request has failed already."""
    with b.events("RESUME") as news:
        while (await b.execute("query-status"))["status"] == "inmigrate":
            # One that does not run says nothing.
            with suppress(VmSilentError):
                await b.next_event(news, LOOK, "RESUME")


async def fence_source(m: Migration) -> None:
    """Keep everybody from writing to the old disks, and end the QEMU that could go on with the old guest.

    The guest runs on B already, so what fails here is told and does not stop the disk from following it.
    """
    images, limits = listed(disk.image for disk in m.disks), m.plan.limits
    away = not await has_another_guest(m.a)
    try:
        if m.fence is None or not m.fence.running:
            await start_fence(m, away=away)
        elif away:
            await put_away(m)
        assert m.fence
        await m.fence.ready(limits.start)
    except MigrationError as error:
        m.report.note(f"no fence: {error}; do not let anyone open {images} on A")
    if await serve_files(m):
        await end_source(m)
    else:
        m.report.note(f"A's QEMU was not ended, as it serves {images}; never let its guest go on")
    await note_places(m)
    for disk in m.state.disks if away else ():
        if disk.moved != disk.away:
            why = "see to it that nothing there starts a guest on it"
            m.report.note(f"{disk.source} on A keeps its name: {why}")


async def has_another_guest(a: Vm) -> bool:
    """Tell whether A's QEMU says that it has a guest that this migration has not sent."""
    try:
        status = await a.execute("query-status", limit=PARTING)
    except MigrationError:
        return False
    return is_another_guest(status)


def is_another_guest(status: Mapping[str, Any]) -> bool:
    """Tell the same from what query-status answers."""
    return bool(status["running"]) or status["status"] in NOT_OURS


async def end_source(m: Migration) -> None:
    """End A's QEMU, from which the guest has gone; what fails is told."""
    images, limits = [disk.image for disk in m.disks], m.plan.limits
    try:
        with suppress(VmGoneError):
            status = await m.a.execute("query-status")
            if is_another_guest(status):
                m.report.note(
                    f"A's QEMU was not ended, as it has a guest ({status['status']}) that this migration has "
                    f"not sent; never let one run on {listed(images)}"
                )
                await through_qemu.end(m)
                await through_qemu.forget(m)
                return
            await through_qemu.end(m)
            await m.a.execute("quit")
        async with asyncio.timeout(limits.stop):
            await m.a.gone()
        await through_qemu.forget(m)
    except (MigrationError, TimeoutError) as error:
        m.report.note(f"A's QEMU did not end ({error}); never let its guest go on")
