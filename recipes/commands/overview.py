"""``nbd-migrate list``, ``status`` and ``cleanup``: what the journals tell. They touch no host."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from nbdserve.common.sizes import format_size
from recipes.certificates import placing
from recipes.errors import MigrationError
from recipes.hosts.quoting import listed, pasted
from recipes.migrate import journal
from recipes.migrate.console import describe, describe_precopy, describe_ram
from recipes.migrate.leftovers import (
    certificates_of,
    discarding,
    made,
    made_flash,
    removing_flash,
    removing_sockets,
)
from recipes.migrate.lock import UNKNOWN_PROCESS
from recipes.migrate.progress import PrecopyProgress, Progress, RamProgress
from recipes.migrate.state import BEFORE, OVER, Phase, State, called
from recipes.plans.reaching import host_of
from recipes.qemu import bitmaps
from recipes.qemu.exporter import removing_place
from recipes.running.speed import described
from recipes.running.window import window_of
from recipes.steps import advice

LOOK = 1.0
"""Seconds between two looks of ``status --watch``."""

PHASES = {
    Phase.PREPARED: "the checks have passed; nothing has been started",
    Phase.EXPORT: "step 1, the export of A's disk",
    Phase.OVERLAY: "step 2, the image on B",
    Phase.LAUNCH: "step 3, B's QEMU",
    Phase.PRECOPY: "step 4, the disk is copied while the guest runs on A",
    Phase.MIGRATE: "step 4, the RAM moves",
    Phase.SWITCH_OVER: "step 4, the guest changes sides",
    Phase.ARRIVED: "step 4, the guest is on B; A's disk is fenced and A's QEMU ended",
    Phase.STREAM: "step 5, the disk follows the guest to B",
    Phase.COMPLETE: "every block is on B",
    Phase.SHUT_DOWN: "step 6, what is left on A is ended",
    Phase.DONE: "done: the guest and its disk are on B",
    Phase.TAKING_BACK: "the guest is being given back to A",
    Phase.TAKEN_BACK: "taken back: the guest is on A",
    Phase.LOST: "A's QEMU ended while it had the guest",
    Phase.RECOVERING: "what the guest wrote on B is written to A's images, which are no disks meanwhile",
    Phase.RECOVERED: "recovered: the guest's disk is on A, with all that it wrote on B",
}


def rows() -> Iterator[str]:
    """Yield a line for each migration that is known."""
    names = journal.names()
    width = max((len(name) for name in names), default=0)
    for name in names:
        try:
            state = journal.last(name)
        except journal.EmptyJournalError:
            yield f"{name:<{width}}  nothing was begun"
            continue
        except MigrationError as error:
            yield f"{name:<{width}}  {error}"
            continue
        try:
            who = _who(name, state)
        except MigrationError as error:
            who = str(error)
        yield f"{name:<{width}}  {state.phase.value:<11}  {_stamp(state.time)}  {who}"


def _who(name: str, state: State) -> str:
    if pid := journal.actor(name):
        return f"{_process(pid)} is at work"
    if state.over:
        return ""
    if state.phase in OVER:
        return "it has left something behind: abort it"
    if state.phase is Phase.RECOVERING:
        return f"nobody is at work: {state.onward}"
    return "nobody is at work: resume it, or abort it"


def _process(pid: int) -> str:
    return f"process {pid}" if pid > 0 else "another process"


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def lines(name: str) -> list[str]:
    """Return what is known of one migration, for the operator. Raises MigrationError where there is none."""
    state, pid = journal.last(name), journal.actor(name)
    told = [f"{name}: {PHASES[state.phase]} (since {_stamp(state.time)})"]
    for disk in state.disks:
        if state.phase is Phase.RECOVERED:
            told.append(f"disk: {disk.source} on A is the guest's; {disk.target} on B is of no use any more")
            continue
        whole = "complete" if disk.complete else "not complete"
        seeded = f", {format_size(disk.seeded)} of it from its seed" if disk.seeded else ""
        told.append(
            f"disk: {disk.source} on A, {disk.target} on B, {format_size(disk.size)}, {whole} on B{seeded}"
        )
        if disk.verified or disk.written:
            told.append(
                f"verified: {format_size(disk.verified)} of {disk.target} are as on A, "
                f"{format_size(disk.written)} have been written by the guest on B"
            )
    if state.plan.verifies and state.phase not in OVER and not state.complete:
        told.append("what is copied is compared with A in the end")
    if state.paused and state.phase not in BEFORE:
        told.append(advice.paused(state))
    if (moving := progress(name, state)) is not None:
        told.append(f"stream: {describe(moving)}")
    if (window := window_of(state, journal.progress(name), at_work=pid != 0)) is not None:
        told.append(f"window: {window.described()}")
    if (before := precopy_progress(name, state)) is not None:
        told.append(describe_precopy(before))
        told.append(f"to let the guest go now: nbd-migrate cutover {name}")
    told += rounds_told(state)
    if (ram := ram_progress(name, state)) is not None:
        told.append(describe_ram(ram))
    if state.phase in BEFORE | {Phase.ARRIVED, Phase.STREAM} and (state.plan.limits.speed or state.finish_by):
        told.append(f"the stream may take {described(state.plan.limits.speed, state.finish_by)}")
    if state.recoveries:
        told.append(f"interrupted and taken up again {state.recoveries} times")
    if state.over:
        told.append(f"over; to forget it: nbd-migrate cleanup {name}")
    elif pid:
        told.append(f"{_process(pid)} is at work")
    elif state.phase in OVER:
        told += left_behind(state)
        told.append(f"to clear that away: nbd-migrate abort {name}")
    else:
        told.append(f"nobody is at work; to go on: {state.onward}")
        if state.phase in BEFORE:
            told.append(f"to give up: nbd-migrate abort {name}")
        if state.complete:
            told.append(f"if A's host is gone for good: nbd-migrate cleanup --force {name}")
    return told


def left_behind(state: State) -> list[str]:
    """Return a phrase for each thing that a migration has started or made, and that may still be there."""
    plan = state.plan
    told = [f"{called(each.role, plan, each.disk)}: process {each.pid}" for each in state.processes]
    host = host_of("B", plan.destination)
    for disk in made(state):
        discard = pasted(host.typed(discarding(host, plan, disk)))
        told.append(f"{disk.target} on B; this removes it, if it holds nothing: {discard}")
    for target in made_flash(state):
        told.append(f"{target} on B; this removes it: {pasted(host.typed(removing_flash(target)))}")
    if not state.made and state.phase not in BEFORE | OVER:
        for each in state.disks:
            until = "" if each.complete else f", and {each.on_a} on A until that is complete"
            told.append(f"the guest's disk, which is to be kept: {each.target} on B{until}")
    if state.tracking:
        told.append(
            f"dirty bitmaps {bitmaps.PREFIX}* that A's QEMU may have on {listed(state.tracking.nodes)} "
            "(block-dirty-bitmap-remove ends them)"
        )
    if state.exporter:
        here = host_of("A", plan.source)
        remove = pasted(here.typed(removing_place(state.exporter)))
        told.append(
            f"an NBD server that A's QEMU may have (nbd-server-stop ends it), with its socket in "
            f"{state.exporter}; this removes that: {remove}"
        )
    for there, directory in certificates_of(host_of("A", plan.source), host, state):
        remove = pasted(there.typed(placing.removing(directory)))
        told.append(f"the keys of this migration, {directory} on {there.name}; this removes them: {remove}")
    for there, command in removing_sockets(host_of("A", plan.source), host, state):
        remove = pasted(there.typed(command))
        told.append(f"sockets of the channel on {there.name}; this removes them: {remove}")
    return [f"left: {each}" for each in told]


def progress(name: str, state: State) -> Progress | None:
    """Return how far the stream is, as was told last; None where it does not move."""
    found = journal.progress(name)
    if state.phase is not Phase.STREAM or found is None or found.time < state.arrived:
        return None
    return found.progress


def ram_progress(name: str, state: State) -> RamProgress | None:
    """Return how far the RAM is, as was told last; None where it does not move."""
    found = journal.progress(name)
    return None if state.phase is not Phase.MIGRATE or found is None else found.ram


def precopy_progress(name: str, state: State) -> PrecopyProgress | None:
    """Return how far the copying before the cut-over is, as was told last; None where there is none."""
    found = journal.progress(name)
    return None if state.phase is not Phase.PRECOPY or found is None else found.precopy


def rounds_told(state: State) -> list[str]:
    """Return what is known of the copying before the cut-over, once that is over."""
    if not state.rounds:
        return []
    count = state.rounds[-1].number + 1
    told = [f"copied before the cut-over: {format_size(state.precopied)}, rounds: {count}"]
    if (expected := state.prediction) is not None:
        actual = f", and took {state.window:.1f} s" if state.window else ""
        told.append(
            f"the window was predicted to take {expected.seconds:.1f} s ({format_size(expected.missing)} "
            f"were left){actual}; the last bitmap took {expected.added * 1000:.0f} ms of the downtime"
        )
    return told


def as_json(name: str) -> str:
    """Return everything that is known of one migration, as one JSON object on one line."""
    states = journal.history(name)
    state, pid = states[-1], journal.actor(name)
    moving, ram = progress(name, state), ram_progress(name, state)
    before = precopy_progress(name, state)
    window = window_of(state, journal.progress(name), at_work=pid != 0)
    values: dict[str, Any] = json.loads(state.to_json())
    values |= {
        "over": state.over,
        "at-work": pid != 0,
        "actor": pid if pid > 0 else None,
        "progress": None if moving is None else dataclasses.asdict(moving),
        "precopy": None if before is None else dataclasses.asdict(before),
        "ram": None if ram is None else dataclasses.asdict(ram),
        "source-needed": None if window is None else dataclasses.asdict(window),
        "history": [{"phase": each.phase.value, "time": each.time} for each in states],
    }
    return json.dumps(values)


def watch(name: str, tell: Callable[[str, Progress | None], None], *, as_object: bool) -> None:
    """Tell of a migration whenever something has changed, until it is over or nobody is at work on it."""
    before = ""
    while True:
        at_work = journal.actor(name) != 0
        now = as_json(name) if as_object else "\n".join(lines(name))
        if now != before:
            tell(now, progress(name, journal.last(name)))
            before = now
        if not at_work:
            return
        time.sleep(LOOK)


def to_be_forgotten(name: str, *, force: bool = False) -> list[str]:
    """Return a phrase for each thing of a migration that may still be there when it is forgotten.

    Raises MigrationError when somebody is at work on it, or when it is not over, unless with ``force``.
    """
    if pid := journal.actor(name):
        shown = "somebody" if pid == UNKNOWN_PROCESS else f"process {pid}"
        raise MigrationError(f"{name}: {shown} is at work on this migration; end that first")
    try:
        state = journal.last(name)
    except journal.EmptyJournalError:
        state = None
    except MigrationError:
        # Its journal cannot be read: nothing else can be done about it.
        if not force:
            raise
        state = None
    if state is not None and not state.gives_way and not force:
        raise MigrationError(f"{name} {state.standing}")
    return [] if state is None else left_behind(state)


def over() -> list[str]:
    """Return the names of all migrations that are over."""
    return [state.name for state in journal.known() if state.over]
