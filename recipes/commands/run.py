"""The six steps in order, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdserve.common.errors import OperatorError
from recipes.channel import keys
from recipes.checks.both_hosts import check_hosts
from recipes.checks.space import Need
from recipes.commands.abort import abort
from recipes.commands.retreat import retreat
from recipes.engines.seeds import check_seeds
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.images import files_at
from recipes.hosts.interruption import undisturbed
from recipes.migrate.guard import start_guard
from recipes.migrate.journal import Journal, actor, check_name, last, of_destination, usable_name
from recipes.migrate.progress import Outcome, Report, Step, StepResult
from recipes.migrate.runtime import FINISH, AdvisedError, Migration
from recipes.migrate.state import OVER, Disk, Phase, State
from recipes.migrate.watch import Orders
from recipes.plans.hooks import Hook
from recipes.plans.plan import Plan
from recipes.plans.reaching import find_commands, hosts, source_monitor
from recipes.precopy.rounds import copied_before
from recipes.processes.children import Children
from recipes.qemu.devices import devices_of
from recipes.qemu.source import capabilities_on
from recipes.qemu.vm import Vm, VmGoneError
from recipes.recovering.booting import how_started
from recipes.running.hooks import beside, call, tell, told_of_failure
from recipes.steps import preflight
from recipes.steps.create import create_overlay
from recipes.steps.cutover import cut_over
from recipes.steps.export import export
from recipes.steps.launch import launch
from recipes.steps.shut_down import shut_down
from recipes.steps.stream import stream

Body = Callable[[Migration], Coroutine[Any, Any, str]]


async def migrate_guest(m: Migration) -> str:
    """Step 4, of which the operator's hook may say no; with policy hybrid the disks are copied first."""
    async with copied_before(m) as rounds:
        await call(m, Hook.BEFORE_CUTOVER)
        m.refuse_the_dead()
        return await cut_over(m, rounds)


STEPS: tuple[tuple[Step, Body], ...] = (
    (Step.EXPORT, export),
    (Step.OVERLAY, create_overlay),
    (Step.LAUNCH, launch),
    (Step.MIGRATE, migrate_guest),
    (Step.STREAM, stream),
    (Step.SHUTDOWN, shut_down),
)

UNTIL_CUTOVER = 4
"""Steps after which the guest is on B."""


async def migrate(
    plan: Plan,
    report: Report,
    *,
    name: str = "",
    base: Path | None = None,
    children: Children | None = None,
    finish: str = FINISH,
    finish_by: float = 0.0,
) -> Outcome:
    """Run the six steps; return when nothing on host A is needed any more.

    ``name`` is the migration's, or else the guest's; its journal lies in ``base``, or where journal.py says.
    Without ``children``, the processes started here end with this one until the cut-over, and live on by
    themselves after it, as they carry the guest. With ``children`` (the caller's, as in the demo) they end
    with that block in any case. ``finish`` is the command that does what is left when the guest has come to
    B, for messages; empty: ``nbd-migrate resume NAME``. ``finish_by`` (seconds since the epoch) is when the
    stream is to have ended; 0: at the plan's speed.

    Raises UsageError or ConnectError when a check fails before anything was started, MigrationError, whose
    one line says where the guest is and what to do, when a step fails. When the task is cancelled, that line
    goes to ``report.note`` instead.
    """
    async with AsyncExitStack() as stack:
        places = await stack.enter_async_context(hosts(plan))
        plan, places = await find_commands(plan, *places)
        a = await source_monitor(plan, places[0])
        stack.push_async_callback(a.disconnect)
        with nothing_started():
            name = check_name(name) if name else await name_of(a, plan)
        if base is None:
            refuse_another(name, plan)
            if has_left_something(name):
                # A monitor has one client.
                await a.disconnect()
                await abort(name, report)
                a = await source_monitor(plan, places[0])
                stack.push_async_callback(a.disconnect)
        journal = stack.enter_context(closing(Journal.begin(name, base)))
        return await migrate_from(plan, report, journal, places, a, stack, children, finish, finish_by)


async def migrate_from(
    plan: Plan,
    report: Report,
    journal: Journal,
    places: tuple[Host, Host],
    a: Vm,
    stack: AsyncExitStack,
    children: Children | None,
    finish: str,
    finish_by: float,
) -> Outcome:
    """Run the six steps from the first one on, with a journal of which nothing is needed any more."""
    with nothing_started():
        sizes, told = await preflight.check(plan, a, *places)
        keys.check_life(plan, sum(sizes), finish_by, time.time())
        needs = [Need(disk.target, size) for disk, size in zip(plan.disks, sizes, strict=True)]
        async for warning in check_hosts(plan, needs, a, *places):
            report.note(warning)
        for warning in (*told, *await check_seeds(plan, needs, places[1])):
            report.note(warning)
        if plan.verifies:
            report.note("what is copied is compared with A in the end (--no-verify leaves that out)")
        capabilities = await capabilities_on(a)
        devices = await devices_of(a)
        command = await how_started(plan, places[0])
        paths = [disk.image for disk in plan.disks]
        files = await files_at(places[0], paths, plan.limits.command)
    state = State(
        journal.directory.name,
        plan.settled,
        disks=tuple(
            Disk(disk.image, disk.target, size, file)
            for disk, size, file in zip(plan.disks, sizes, files, strict=True)
        ),
        capabilities=tuple(capabilities),
        devices=devices,
        command=command,
        finish=finish or f"nbd-migrate resume {journal.directory.name}",
        finish_by=finish_by,
    )
    write(journal, state)
    ours = await stack.enter_async_context(Children()) if children is None else children
    owned = children is not None
    try:
        control = next((host.control for host in places if host.control), "")
        orders = Orders(str(journal.directory), journal.fd, journal.lock.fd, owned, control)
        guard = await start_guard(orders)
    except BaseException:
        # Nothing was started.
        with suppress(OSError):
            journal.append(replace(state, phase=Phase.TAKEN_BACK))
        raise
    stack.push_async_callback(guard.close)
    m = Migration(journal, places, report, ours, guard, a, owned=owned)
    stack.push_async_callback(m.close)
    return await run(m)


@contextmanager
def nothing_started() -> Iterator[None]:
    """Say what the end of A's QEMU means in the meantime: MigrationError."""
    try:
        yield
    except VmGoneError as error:
        told = "before anything was started, and with it the guest; its disk is untouched"
        raise MigrationError(f"{error} {told}") from error


async def name_of(a: Vm, plan: Plan) -> str:
    """Return the name of a migration that was given none: the guest's, or else that of its first disk."""
    return usable_name((await a.execute("query-name")).get("name") or Path(plan.disks[0].image).stem)


def refuse_another(name: str, plan: Plan) -> None:
    """Raise MigrationError when a migration of another name makes the same image, and is not over."""
    for state in of_destination(plan):
        if state.name != name and not state.over:
            taken = {disk.target for disk in state.plan.disks}
            target = next(disk.target for disk in plan.disks if disk.target in taken)
            pid = actor(state.name)
            stands = f"is still at work, process {pid}" if pid > 0 else state.standing
            raise MigrationError(
                f"{plan.called('target')}: {target} is that of migration {state.name}, which {stands}"
            )


def has_left_something(name: str) -> bool:
    """Tell whether a migration of this name was given up, and could not be cleared away."""
    try:
        state = last(name)
    except MigrationError:
        return False
    return state.phase in OVER and not state.over


def write(journal: Journal, state: State) -> None:
    """Write down a first state; MigrationError where that fails."""
    try:
        journal.append(state)
    except OSError as error:
        raise MigrationError(f"{journal.directory}: {error.strerror}") from error


async def run(m: Migration) -> Outcome:
    """Run the steps of a migration that has been prepared, and call the operator's hooks."""
    async with told_of_failure(m):
        results = await go_through(m, STEPS[:UNTIL_CUTOVER], retreat)
        async with beside(m, Hook.AFTER_CUTOVER):
            results += await go_through(m, STEPS[UNTIL_CUTOVER:], retreat)
        m.done()
    await tell(m, Hook.DONE)
    arrival = m.state.arrival
    outcome = Outcome(
        steps=tuple(results),
        downtime_ms=arrival.downtime_ms if arrival else 0,
        migrate_ms=arrival.total_ms if arrival else 0,
        ram_bytes=arrival.ram_bytes if arrival else 0,
        disk_bytes=m.size,
        window=m.state.window,
        recoveries=m.state.recoveries,
        precopied=m.state.precopied,
        rounds=m.state.rounds[-1].number + 1 if m.state.rounds else 0,
        predicted=m.state.prediction.seconds if m.state.prediction else None,
        added_ms=round(m.state.prediction.added * 1000) if m.state.prediction else 0,
        seeded=m.state.seeded,
        verified=sum(disk.verified for disk in m.state.disks),
        written=sum(disk.written for disk in m.state.disks),
    )
    m.report.finished(outcome)
    return outcome


async def go_through(m: Migration, steps: Sequence[tuple[Step, Body]], retreat: Body) -> list[StepResult]:
    """Take these steps. After a failure ``retreat`` returns one phrase that says where the guest is."""
    results: list[StepResult] = []
    for step, body in steps:
        begin = time.monotonic()
        try:
            m.report.step_started(step)
            summary = await body(m)
            results.append(StepResult(step, time.monotonic() - begin, summary))
            m.report.step_done(results[-1])
        except OperatorError as error:
            reason = await m.explain(error)
            where = await undisturbed(retreat(m))
            told = reason if isinstance(error, AdvisedError) else f"{reason}; {where}"
            raise MigrationError(f"step {step.number} ({step.title}): {told}") from error
        except asyncio.CancelledError:
            where = await undisturbed(retreat(m))
            m.report.note(f"interrupted in step {step.number} ({step.title}); {where}")
            raise
        except BaseException as error:
            # Whatever it is, the guest must not be left between two hosts.
            where = await undisturbed(retreat(m))
            reason = f"unexpected {type(error).__name__}: {error}"
            raise MigrationError(f"step {step.number} ({step.title}): {reason}; {where}") from error
    return results
