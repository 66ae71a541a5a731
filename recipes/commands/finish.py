"""``nbd-migrate finish``: what is left to do when a run has ended after the cut-over, however it ended.

It looks before it acts, and refuses unless the guest has left A for good. What the run has started and still
lives is taken over, and what has ended is started again; then steps 5 and 6 go on as in the run. A guest that
has ended on B is no obstacle: its disk is completed without it, or, with ``boot``, it is started again.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, closing, suppress

from nbdserve.common.errors import OperatorError
from recipes.commands.finding import found, journal_of
from recipes.commands.retreat import where_on_b
from recipes.commands.run import go_through
from recipes.engines.choice import engine_for
from recipes.engines.interface import blockdev_options, reached
from recipes.errors import MigrationError
from recipes.migrate.journal import Journal
from recipes.migrate.progress import Report, Step
from recipes.migrate.runtime import READY, Migration, gone
from recipes.migrate.state import Phase, Role
from recipes.plans.plan import Plan
from recipes.qemu.vm import CommandError
from recipes.steps.cutover import fence_source
from recipes.steps.export import check_export, start_server
from recipes.steps.launch import check_device, monitor_option
from recipes.steps.recovery import JOB
from recipes.steps.shut_down import clear_source, detach
from recipes.steps.stream import stream
from recipes.steps.without_guest import go_without_guest


async def shut_down(m: Migration) -> str:
    """Step 6, at which A may be without a fence."""
    m.enter(Phase.SHUT_DOWN)
    await detach(m)
    if m.fence is None and await m.host_a.test("-e", m.plan.source.image, m.plan.limits.command):
        await raise_fence(m)
    return await clear_source(m)


STEPS = ((Step.STREAM, stream), (Step.SHUTDOWN, shut_down))


async def finish(plan: Plan, report: Report, *, boot: bool = False, again: str) -> None:
    """Do what is left of steps 5 and 6. ``again`` is the command that the operator has typed.

    Raises MigrationError: nothing was touched when the guest has not left A; otherwise the line says where
    the guest is and what to do.
    """
    await finish_with(journal_of(plan), plan, report, boot=boot, again=again)


async def finish_with(
    journal: Journal, plan: Plan, report: Report, *, boot: bool, again: str, sure: bool = False
) -> None:
    """Do the same with a journal that was taken over already, and close it.

    ``sure`` says that the guest is, or was, on B, whatever A's QEMU says of its migration.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(closing(journal))
        m = await found(journal, plan, report, stack, again=again, sure=sure)
        try:
            await take_up(m, boot=boot)
        except OperatorError as error:
            raise MigrationError(f"{error}; {await where(m)}") from error
        await go_through(m, STEPS[m.complete :], where)
        m.done()
        report.note(f"done: the guest's disk is {plan.destination.image} on B, and needs nothing on A")


async def take_up(m: Migration, *, boot: bool) -> None:
    """See that everything is there that the rest of the steps need."""
    await secure(m)
    if m.b:
        m.need("B's QEMU", gone(m.b))
        if boot:
            m.report.note("B's QEMU is there: it is not started")
    elif boot:
        await start_guest(m)
    else:
        m.report.note("the guest does not run on B; its disk is completed without it")
        await go_without_guest(m)
    await set_speed(m)


async def where(m: Migration) -> str:
    """Return where the guest is when something fails here: on B, as it was before."""
    return where_on_b(m)


async def secure(m: Migration) -> None:
    """See that A is fenced and, as long as it is needed, serves its disk."""
    if m.a.connected:
        await fence_source(m)
    elif not m.complete and m.fence is None:
        await raise_fence(m)
    if not m.complete:
        await ensure_export(m)


async def set_speed(m: Migration) -> None:
    """Give a stream that was begun already the speed of the plan, which may be another one now."""
    jobs = m.overlay_monitor or m.b
    if jobs:
        with suppress(CommandError):
            await jobs.execute("block-job-set-speed", device=JOB, speed=m.plan.limits.speed)


async def raise_fence(m: Migration) -> None:
    """Keep everybody from writing to A's disk; MigrationError where somebody does that already."""
    image, limit = m.plan.source.image, m.plan.limits.start
    command = m.host_a.own("fence", READY, image, "--free")
    fence = await m.start(Role.FENCE, command, ready=True)
    await m.during(fence.ready(limit), limit, "raising the fence on A")


async def ensure_export(m: Migration) -> None:
    """See that A serves its disk; by our server, or by one that somebody has started meanwhile."""
    limits = m.plan.limits
    if m.server is None:
        try:
            await m.during(check_export(m), limits.connect, "reaching the export from B")
            return
        except MigrationError:
            await start_server(m)


async def start_guest(m: Migration) -> None:
    """Start the guest on B again, as after a power failure, on what there is of its disk."""
    destination, limits = m.plan.destination, m.plan.limits
    if m.complete:
        nodes = [engine_for(m).complete_node(m.plan)]
    else:
        await engine_for(m).prepare_again(m)
        nodes = engine_for(m).nodes(m.plan)
    argv = [*destination.qemu, *blockdev_options(nodes), "-qmp", monitor_option(destination.qmp)]
    qemu = await m.start(Role.QEMU, argv)
    m.need("B's QEMU", qemu.wait())
    m.b = await m.during(reached("B's QEMU", destination.qmp, m.plan), limits.start, "starting B's QEMU")
    await m.during(check_device(m.plan, m.b), limits.command, "looking at B's disk")
    m.report.note(f"the guest was started again on B, process {qemu.pid}")
