"""What is done when a step has failed, or was interrupted: the guest goes back to A, or stays on B."""

from __future__ import annotations

import time
from contextlib import suppress

from recipes.errors import MigrationError
from recipes.migrate.decide import UNKNOWN, Action, Wish
from recipes.migrate.leftovers import remove_channel, remove_exporter, remove_made
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role, State, entered
from recipes.migrate.way_back import Hands, WayBack
from recipes.plans.reaching import monitor_a
from recipes.processes.children import Child
from recipes.qemu.destination import answer_of
from recipes.qemu.facts import OnB
from recipes.qemu.vm import Vm, VmGoneError, connect_again
from recipes.steps import advice
from recipes.steps.causes import described
from recipes.steps.cutover import fence_source

IN_TURN = (Role.QEMU, Role.OVERLAY, Role.TUNNEL, Role.SERVER, Role.CHANNEL, Role.FENCE)
"""In which order what was started is ended."""


async def retreat(m: Migration) -> str:
    """After a failure: give the guest back to A, or leave it on B; return one phrase that says which."""
    if not m.arrived:
        way = WayBack(OwnHands(m), m.state, wish=Wish.GO_BACK, grace=0.0)
        try:
            verdict = await way.go()
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing that may carry the guest ends
            return unknown(m, str(error))
        if verdict.action is Action.KEEP:
            return unknown(m, verdict.where, hangs=verdict.decision.words == UNKNOWN)
        if verdict.action is not Action.KEEP_B:
            return verdict.where
        m.enter(Phase.ARRIVED, arrived=time.time(), made=(), disks=m.state.with_moved())
        with suppress(MigrationError):
            m.release()
    return await after_cut_over(m)


def unknown(m: Migration, why: str, *, hangs: bool = True) -> str:
    """Let everything live on; the phrase that says so. ``hangs``: a QEMU may, and not say what it has."""
    with suppress(MigrationError):
        m.release()
    told, name = why if why.startswith(UNKNOWN) or not hangs else f"{UNKNOWN}: {why}", m.state.name
    if hangs and m.qemu and m.qemu.running:
        told += f"; if B's QEMU (process {m.qemu.pid}) hangs too, kill it: A's goes on with the guest"
    return (
        f"{told}; look at query-migrate on A before anything else; then: nbd-migrate resume {name}, or: "
        f"nbd-migrate abort {name}"
    )


class OwnHands(Hands):
    """What the command itself can do: it knows the processes."""

    def __init__(self, m: Migration) -> None:
        super().__init__()
        self._m = m

    async def source(self) -> Vm | None:
        """Return A's QEMU; connected to again where only the connection was lost."""
        m = self._m
        if m.a.connected:
            return m.a
        where, limits = monitor_a(m.plan, m.host_a), m.plan.limits
        again = await connect_again("A's QEMU", where, limit=limits.connect, command_limit=limits.command)
        if again is not None:
            m.a = again
            self.said.append("its QEMU's monitor had hung up, and was connected to again")
        return again

    async def destination(self, limit: float | None) -> OnB:
        """Ask B's QEMU. It may not run there: what ends A's QEMU may end the export, too."""
        m = self._m
        if m.b is None:
            return OnB.NONE
        try:
            return await answer_of(m.b, limit)
        except VmGoneError:
            await m.guest_has_ended()
            if not m.guest_end and m.has_guest:
                return OnB.SILENT
            return await self.without_b(m.host_b, m.state)

    @property
    def saw_the_end(self) -> bool:
        """Tell whether A's QEMU has said that it ends."""
        return self._m.a.shut_down is not None

    def lost(self, words: str, state: State) -> str:
        """Say why A's guest has ended, where QEMU has said so."""
        ended = self._m.a.shut_down
        return f"{described(ended, 'A')}; its disk is untouched" if ended else super().lost(words, state)

    async def end_destination(self) -> None:
        """End B's QEMU."""
        await stop(self._m, await self.child(Role.QEMU))

    async def child(self, role: Role, drive: str = "") -> Child | None:
        """Return the process in a role, if one was started."""
        return self._m.child(role, drive)

    async def clear(self) -> list[str]:
        """End what was started and remove what was made; return a phrase for each that is left."""
        m, left = self._m, []
        for role, drive in m.roles(*IN_TURN):
            try:
                await stop(m, await self.child(role, drive))
            except MigrationError as error:
                left.append(str(error))
        left += await remove_made(m.host_b, m.state, m.plan.limits.command)
        left += await remove_exporter(m.host_a, m.state, m.plan.limits.command)
        return left + await remove_channel(m.host_a, m.host_b, m.state, m.plan.limits.command)

    def enter(self, phase: Phase, *, cleared: bool = False) -> None:
        """Write it down."""
        state = entered(self._m.state, phase, cleared=cleared)
        with suppress(MigrationError):
            kept = ("made", "processes", "certificates", "exporter", "tunnel", "tracking")
            left = {key: getattr(state, key) for key in kept}
            self._m.enter(phase, **left)


async def stop(m: Migration, child: Child | None) -> None:
    """End a child, if it was started; MigrationError when it does not end."""
    if child and child.running:
        await child.stop(m.plan.limits.stop)


async def after_cut_over(m: Migration) -> str:
    """Return what is so after a failure behind the cut-over. A must not go on in any case."""
    if m.a.connected or m.state.exporter or not (m.fence or m.complete):
        await fence_source(m)
    await m.guest_has_ended()
    return where_on_b(m)


def where_on_b(m: Migration) -> str:
    """Return where the guest and its disk are behind the cut-over.

    Where all is done, the migration is over.
    """
    where = advice.after_cut_over(m)
    if m.cleared:
        m.done()
    return where
