"""``nbd-migrate finish``: what is left to do when a run has ended after the cut-over, however it ended.

It looks before it acts, and refuses unless the guest has left A for good. What the run has started and still
lives is taken over, and what has ended is started again; then steps 5 and 6 go on as in the run. A guest that
has ended on B is no obstacle: its disk is completed without it, or, with ``boot``, it is started again.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, closing

from nbdserve.common.errors import OperatorError
from recipes.channel import carriers, through_qemu, tls
from recipes.commands.finding import found, journal_of
from recipes.commands.readdress import serve_there
from recipes.commands.retreat import where_on_b
from recipes.commands.run import go_through
from recipes.engines.choice import engine_for
from recipes.engines.interface import blockdev_options, reached
from recipes.errors import MigrationError
from recipes.fencing.source_images import files_on_a, note_places, put_away, start_fence
from recipes.hosts.quoting import listed
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import sockets_of_qemu
from recipes.migrate.progress import Report, Step
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.hooks import Hook
from recipes.plans.plan import Plan
from recipes.plans.reaching import monitor_b
from recipes.recovering.lost_places import make_lost
from recipes.running.hooks import beside, tell, told_of_failure
from recipes.steps.cutover import fence_source
from recipes.steps.export import check_exports, serve_files, start_server
from recipes.steps.launch import check_devices, monitor_option
from recipes.steps.shut_down import clear_source, detach
from recipes.steps.stream import stream_again
from recipes.steps.without_guest import go_without_guest


async def shut_down(m: Migration) -> str:
    """Step 6, at which A may be without a fence."""
    m.enter(Phase.SHUT_DOWN)
    await detach(m)
    # Some may have been moved aside.
    if m.fence is None and all(file for _, file in await files_on_a(m, m.disks)):
        await raise_fence(m)
    return await clear_source(m)


STEPS = ((Step.STREAM, stream_again), (Step.SHUTDOWN, shut_down))


async def finish(plan: Plan, report: Report, *, boot: bool = False, again: str) -> None:
    """Do what is left of steps 5 and 6. ``again`` is the command that the operator has typed.

    Raises MigrationError: nothing was touched when the guest has not left A; otherwise the line says where
    the guest is and what to do.
    """
    await finish_with(journal_of(plan), plan, report, boot=boot, again=again)


async def finish_with(
    journal: Journal,
    plan: Plan,
    report: Report,
    *,
    boot: bool,
    again: str,
    sure: bool = False,
    moved: bool = False,
) -> None:
    """Do the same with a journal that was taken over already, and close it.

    ``sure`` says that the guest is, or was, on B, whatever A's QEMU says of its migration; ``moved`` that A
    has another address than it had.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(closing(journal))
        m = await found(journal, plan, report, stack, again=again, sure=sure)
        async with told_of_failure(m):
            try:
                await take_up(m, boot=boot, moved=moved)
            except OperatorError as error:
                raise MigrationError(f"{error}; {await where(m)}") from error
            async with beside(m, Hook.AFTER_CUTOVER):
                await go_through(m, STEPS[m.complete :], where)
            m.done()
        await tell(m, Hook.DONE)
        several, targets = len(plan.disks) > 1, listed(disk.target for disk in plan.disks)
        are, need = ("disks are", "need") if several else ("disk is", "needs")
        report.note(f"done: the guest's {are} {targets} on B, and {need} nothing on A")


async def take_up(m: Migration, *, boot: bool, moved: bool = False) -> None:
    """See that everything is there that the rest of the steps need."""
    await make_lost_places(m)
    await secure(m, moved=moved)
    if m.b:
        m.need("B's QEMU", m.b.ended())
        if boot:
            m.report.note("B's QEMU is there: it is not started")
    elif boot:
        await start_guest(m)
    else:
        m.report.note("the guest does not run on B; its disk is completed without it")
        await go_without_guest(m)


async def make_lost_places(m: Migration) -> None:
    """Make the directories anew that a reboot of a host has taken, as they were in memory."""
    plan, limit, logs = m.plan, m.plan.limits.command, [f"{m.plan.log.directory}/"]
    await make_lost(m.host_b, [*sockets_of_qemu(plan), *logs], limit)
    if not m.complete:
        socket = plan.export.address.socket
        await make_lost(m.host_a, [*([socket] if socket else []), *logs], limit)


async def where(m: Migration) -> str:
    """Return where the guest is when something fails here: on B, as it was before."""
    return where_on_b(m)


async def secure(m: Migration, *, moved: bool = False) -> None:
    """See that A is fenced and, as long as it is needed, serves its disk, where it has ``moved`` to."""
    if m.a.connected:
        await fence_source(m)
    else:
        if not m.complete and m.fence is None:
            await raise_fence(m)
        elif not m.complete:
            await hold_away(m)
        await serve_files(m)
        await through_qemu.forget(m)
    if not m.complete and moved:
        await serve_there(m)
    if not m.complete:
        await ensure_export(m)


async def raise_fence(m: Migration) -> None:
    """Keep everybody from writing to A's disks; MigrationError where somebody does that already."""
    fence, limit = await start_fence(m, free=True), m.plan.limits.start
    await m.during(fence.ready(limit), limit, "raising the fence on A")
    await note_places(m)


async def hold_away(m: Migration) -> None:
    """See that A's images are out of reach behind a fence that stands; where that fails, it is told."""
    try:
        await put_away(m)
    except MigrationError as error:
        m.report.note(str(error))


async def ensure_export(m: Migration) -> None:
    """See that A serves its disks; by our server, or by one that somebody has started meanwhile."""
    await carriers.stand(m)
    if m.server is None:
        try:
            await check_exports(m, m.pending)
            return
        except MigrationError:
            await start_server(m)


async def start_guest(m: Migration) -> None:
    """Start the guest on B again, as after a power failure, on what there is of its disks."""
    destination, limits, engine = m.plan.destination, m.plan.limits, engine_for(m)
    nodes = []
    for disk in m.disks:
        if disk in m.pending:
            await engine.prepare_again(m, disk)
            nodes += engine.nodes(m.plan, disk)
        else:
            nodes.append(engine.complete_node(disk, m.state.disk(disk).size))
    objects = tls.qemu_options(m, reads_disk=engine.read_by_qemu and not m.complete)
    argv = [*destination.qemu, *objects, *blockdev_options(nodes), "-qmp", monitor_option(destination.qmp)]
    qemu = await m.start(Role.QEMU, argv)
    m.need("B's QEMU", qemu.wait())
    where = monitor_b(m.plan, m.host_b)
    m.b = await m.during(reached("B's QEMU", where, m.plan), limits.start, "starting B's QEMU")
    await m.during(check_devices(m.plan, m.b), limits.command, "looking at B's disks")
    m.report.note(f"the guest was started again on B, process {qemu.pid}")
