"""``nbd-migrate fence --lift``: A's old image is an ordinary one again, whatever the guest has written on B.

By the name of a migration it asks B first, over the same ways as everybody else, and ends what still has the
image on A: the fence, and the server that B reads. By the path of an image it does the same, where the
journal of its migration is on this host, and otherwise goes by the image alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from nbdserve.common.clock import run
from recipes.commands.taking_up import TakenUp, taken_up
from recipes.errors import MigrationError
from recipes.fencing.giving_back import free, marked
from recipes.fencing.source_images import give_back
from recipes.hosts.quoting import listed
from recipes.migrate.journal import known
from recipes.migrate.progress import Report
from recipes.migrate.state import BEFORE, Phase, Role, State
from recipes.plans.plan import way_to
from recipes.plans.reaching import monitor_b
from recipes.qemu.destination import look
from recipes.qemu.facts import OnB


def lift(what: str, report: Report, *, sure: bool) -> None:
    """Lift the fence of a migration, by its name, or of an image of this host, by its path.

    Raises MigrationError or ImageError, with nothing touched: where the guest may go on on B, or unless the
    operator is ``sure``; the line says what is lost then.
    """
    if "/" not in what:
        run(lift_all(what, report, sure=sure))
        return
    image = Path(os.path.abspath(what))
    _, marker = marked(image)
    name = next((each.name for each in known() if is_of(each, marker.image, marker.migration)), "")
    if name:
        run(lift_all(name, report, sure=sure))
        return
    if not sure:
        raise MigrationError(
            f"{image}: its guest went to {marker.to} on {marker.since} (migration {marker.migration}), of "
            "which this host knows no more; see there that it runs no more; what it has written since "
            f"is lost for this image; to lift the fence: {marker.lifting} --yes"
        )
    free(image)
    report.note(f"{marker.image} is as it was on {marker.since}, and nothing keeps a guest from it any more")


def is_of(state: State, image: str, migration: str) -> bool:
    """Tell whether an image of this host was put out of reach by this migration."""
    on_a = image in {disk.source for disk in state.disks}
    return on_a and state.name == migration and not way_to(state.plan.source)


async def lift_all(name: str, report: Report, *, sure: bool) -> None:
    """Lift the fence of all disks of a migration that nobody acts on any more; raises as lift()."""
    async with taken_up(name, report) as taken:
        state, m = taken.state, taken.m
        if state.phase in BEFORE | {Phase.TAKEN_BACK, Phase.LOST, Phase.RECOVERED}:
            raise MigrationError(f"{name}: no image of A is out of reach: see nbd-migrate status {name}")
        plan, images = state.plan, listed(disk.source for disk in state.disks)
        if state.phase is Phase.RECOVERING:
            raise MigrationError(
                f"what the guest wrote on B is being written to {images} on A; nothing was touched: "
                f"nbd-migrate recover {name} --on a"
            )
        on_b = await look(monitor_b(plan, m.host_b), plan.limits.connect)
        if on_b in (OnB.HAS_GUEST, OnB.WAITS):
            raise MigrationError(
                f"the guest runs on B: {images} on A would be its disk a second time; nothing was touched"
            )
        if not sure:
            raise MigrationError(what_is_lost(state, images, on_b))
        for role in (Role.SERVER, Role.FENCE):
            if child := await m.adopt(role):
                await child.stop(plan.limits.stop)
        await give_all_back(taken)
        report.note(f"{images} on A {'are' if len(state.disks) > 1 else 'is'} as when the guest left for B")


async def give_all_back(taken: TakenUp) -> None:
    """Give A's images their names back, and write down that the guest is A's to be started."""
    state, m = taken.state, taken.m
    await give_back(m)
    left = tuple(each for each in state.processes if each.role not in (Role.SERVER, Role.FENCE))
    m.enter(Phase.TAKEN_BACK, processes=left)


def what_is_lost(state: State, images: str, on_b: OnB) -> str:
    """Return the line that says what lifting the fence costs, and what else there is to do."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.arrived))
    silent = "; B's QEMU does not answer, and may have the guest: see to that first"
    return (
        f"all that the guest has written on B since {since} would be lost for {images} on A"
        f"{silent if on_b is OnB.SILENT else ''}; to have the guest back with all that it wrote: nbd-migrate "
        f"recover {state.name}; to lift the fence all the same: nbd-migrate fence --lift {state.name} "
        "--yes"
    )
