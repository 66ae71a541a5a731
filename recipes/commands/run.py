"""The six steps in order, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from nbdserve.common.errors import ConnectError, OperatorError
from recipes.errors import MigrationError
from recipes.hosts.interruption import undisturbed
from recipes.migrate.guard import start_guard
from recipes.migrate.leftovers import but, remove
from recipes.migrate.report import Outcome, Report, Step, StepResult
from recipes.migrate.runtime import FINISH, AdvisedError, Migration, hosts
from recipes.migrate.watch import Orders
from recipes.plans.plan import Plan
from recipes.processes.children import Child, Children
from recipes.qemu.destination import Destination, arrives
from recipes.qemu.source import Side, capabilities_on, give_back, leave_alone
from recipes.qemu.vm import VmGoneError, connect, connect_again
from recipes.steps import advice, preflight
from recipes.steps.causes import described
from recipes.steps.create import create_overlay
from recipes.steps.cutover import cut_over, fence_source
from recipes.steps.export import export
from recipes.steps.launch import launch
from recipes.steps.shut_down import shut_down
from recipes.steps.stream import stream

Body = Callable[[Migration], Coroutine[Any, Any, str]]

ATTEMPTS = 3
"""How often A's QEMU is asked anew when its monitor hangs up in the middle."""

STEPS: tuple[tuple[Step, Body], ...] = (
    (Step.EXPORT, export),
    (Step.OVERLAY, create_overlay),
    (Step.LAUNCH, launch),
    (Step.MIGRATE, cut_over),
    (Step.STREAM, stream),
    (Step.SHUTDOWN, shut_down),
)


async def migrate(
    plan: Plan, report: Report, *, children: Children | None = None, finish: str = FINISH
) -> Outcome:
    """Run the six steps; return when nothing on host A is needed any more.

    Without ``children``, the processes started here end with this one until the cut-over, and live on by
    themselves after it, as they carry the guest. With ``children`` (the caller's, as in the demo) they end
    with that block in any case. ``finish`` is the command that does what is left when the guest has come to
    B, for messages.

    Raises UsageError or ConnectError when a check fails before anything was started, MigrationError, whose
    one line says where the guest is and what to do, when a step fails. When the task is cancelled, that line
    goes to ``report.note`` instead.
    """
    limits = plan.limits
    async with AsyncExitStack() as stack:
        a = await connect("A's QEMU", plan.source.qmp, limit=limits.connect, command_limit=limits.command)
        stack.push_async_callback(a.disconnect)
        places = await hosts(plan)
        size = await preflight.check(plan, a, *places)
        orders = Orders(
            source=plan.source.qmp,
            destination=plan.destination.qmp,
            capabilities=await capabilities_on(a),
            owned=children is not None,
            limit=limits.connect,
            shell=places[1].shell,
            options=places[1].options,
        )
        ours = await stack.enter_async_context(Children()) if children is None else children
        guard = await start_guard(orders)
        stack.push_async_callback(guard.close)
        guard.go_on(finish)
        m = Migration(
            *(plan, places, report, ours, guard, a, size),
            owned=children is not None,
            finish=finish,
        )
        stack.push_async_callback(m.close)
        return await run(m, orders)


async def run(m: Migration, orders: Orders) -> Outcome:
    """Run the steps of a migration that has been prepared."""

    async def back(m: Migration) -> str:
        return await retreat(m, orders)

    results = await go_through(m, STEPS, back)
    outcome = Outcome(
        steps=tuple(results),
        downtime_ms=m.arrival.downtime_ms if m.arrival else 0,
        migrate_ms=m.arrival.total_ms if m.arrival else 0,
        ram_bytes=m.arrival.ram_bytes if m.arrival else 0,
        disk_bytes=m.size,
        window=m.window,
        recoveries=m.recoveries,
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


async def retreat(m: Migration, orders: Orders) -> str:
    """After a failure: give the guest back to A, or leave it on B; return one phrase that says which."""
    if m.arrived is None:
        try:
            where = await go_back(m, orders)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing that may carry the guest ends
            with suppress(MigrationError):
                m.release()
            unknown = f"it is not known where the guest is: {error}"
            if m.qemu and m.qemu.running:
                unknown += (
                    f"; if B's QEMU (process {m.qemu.pid}) hangs too, kill it: A's goes on with the guest"
                )
            return f"{unknown}; look at query-migrate on A before anything else"
        if where:
            return but(where, *await clear(m))
        m.arrived = time.monotonic()
        with suppress(MigrationError):
            m.release()
    return await after_cut_over(m)


async def go_back(m: Migration, orders: Orders) -> str:
    """Give the guest back to A; return one phrase about that, or an empty one when it turns out to be on B.

    Raises MigrationError when who has it is not known.
    """
    said: list[str] = []
    # It may end, or hang up, while it is spoken to.
    for _ in range(ATTEMPTS):
        if not m.a.connected:
            try:
                said += await reach_source_again(m)
            except ConnectError as error:
                if m.continued:
                    raise
                return f"the guest was left on A, but look at it: {error}"
        if not m.a.connected:
            return await without_source(m)
        try:
            return await with_source(m, orders, said)
        except VmGoneError:
            await m.a.gone()
    raise MigrationError("A's QEMU hangs up again and again")


async def with_source(m: Migration, orders: Orders, said: list[str]) -> str:
    """The same, of a QEMU of A's that answers; VmGoneError when it does no more."""
    if m.migrating:
        side = await give_back(
            m.a,
            lambda: stop(m, m.qemu),
            orders.capabilities,
            continued=m.continued,
            tell=said.append,
        )
        return but("the guest runs on A as before", *said) if side is Side.SOURCE else ""
    try:
        return but(await leave_alone(m.a, orders.capabilities), *said)
    except VmGoneError:
        raise
    except MigrationError as error:
        return f"the guest was left on A, but look at it: {error}"


async def without_source(m: Migration) -> str:
    """The same, when A's QEMU has ended."""
    if await has_arrived(m):
        return ""
    if m.a.shut_down:
        return f"{described(m.a.shut_down, 'A')}; its disk is untouched"
    return "A's QEMU is gone and with it the guest; its disk is untouched"


async def reach_source_again(m: Migration) -> list[str]:
    """Connect to A's QEMU where only the connection was lost; return a phrase that says so.

    Raises ConnectError when nobody knows whether it has ended.
    """
    source, limits = m.plan.source, m.plan.limits
    again = await connect_again("A's QEMU", source.qmp, limit=limits.connect, command_limit=limits.command)
    if again is None:
        return []
    m.a = again
    return ["its QEMU's monitor had hung up, and was connected to again"]


async def has_arrived(m: Migration) -> bool:
    """Whether B's QEMU has the guest although A's has ended; MigrationError when nobody knows.

    It may not run there: what ends A's QEMU may end the export, too.
    """
    # Before it is told to switch over, A's QEMU keeps the end of the guest's state.
    if m.b is None or not m.continued:
        return False
    try:
        found = await arrives(m.b)
    except VmGoneError:
        if await m.guest_has_ended():
            return False
        found = Destination.SILENT
    if found is Destination.SILENT:
        raise MigrationError("A's QEMU has ended, and B's does not answer")
    return found is Destination.HAS_GUEST


async def clear(m: Migration) -> list[str]:
    """End what was started and remove what was made; return a phrase for each that is left."""
    left = []
    for child in (m.qemu, m.overlay, m.server):
        try:
            await stop(m, child)
        except MigrationError as error:
            left.append(str(error))
    if m.removal:
        left += await remove(m.host_b, m.removal, m.plan.limits.command)
    return left


async def stop(m: Migration, child: Child | None) -> None:
    """End a child, if it was started; MigrationError when it does not end."""
    if child and child.running:
        await child.stop(m.plan.limits.stop)


async def after_cut_over(m: Migration) -> str:
    """What is so after a failure behind the cut-over. A must not go on in any case."""
    if m.a.connected:
        await fence_source(m)
    await m.guest_has_ended()
    return advice.after_cut_over(m)
