"""What an operator reads who must take over: what is wrong, where everything is, and what to type.

Every command here is one that a shell takes as it stands (recipes/hosts/quoting.py), and is run so by a test.
"""

from __future__ import annotations

from contextlib import suppress

from recipes.errors import MigrationError
from recipes.hosts.images import open_in
from recipes.hosts.quoting import pasted
from recipes.migrate.decide import Wish, decide, told
from recipes.migrate.runtime import Migration
from recipes.migrate.state import State
from recipes.plans.by_hand import asking
from recipes.plans.disks import PlannedDisk
from recipes.qemu.facts import Facts, OnA, OnB
from recipes.steps.export import server_command


async def server_away(m: Migration) -> str:
    """Return what to do where A's server cannot be brought back from here."""
    runs = pasted(m.host_a.typed([*await server_command(m), "--fork"]))
    return f"see that this runs on A: {runs}; then: {m.finish}{elsewhere(m)}"


def elsewhere(m: Migration) -> str:
    """Return what to do where A has come back under another address; empty where that could not be said."""
    plan = m.plan
    over_tcp = plan.export.address.socket is None and plan.destination.engine != "qemu"
    if not over_tcp and not (plan.export.address.socket and plan.source.host):
        return ""
    name = m.state.name
    return f"; when A has come back under another address: nbd-migrate resume {name} --source-address HOST"


async def server_hangs(m: Migration) -> str:
    """Return what to do where A's server is there, but nothing comes."""
    log = await m.place(m.host_a, m.disks[0].image, "nbdserve")
    return f"look at A's disk, at the network and at {log}.log on A; then: {m.finish}{elsewhere(m)}"


async def bad_source(m: Migration, disk: PlannedDisk) -> str:
    """Return what to do where A's disk itself fails."""
    log = await m.place(m.host_a, m.disks[0].image, "nbdserve")
    return (
        f"everything else can be copied; {log}.log on A, the server's log, names the places that cannot be "
        f"read: make them readable in {m.state.disk(disk).on_a}; then: {m.finish}"
    )


async def cut_off_source(m: Migration, image: str, size: int) -> str:
    """Return what to do where A's disk has become shorter; it had ``size`` bytes."""
    zeros = pasted(m.host_a.typed(["truncate", "--size", str(size), image]))
    return (
        "what was behind its end is missing: write that back from a copy; or, if it may be zeros for the "
        f"guest, to make it so: {zeros}; then: {m.finish}"
    )


async def gone_source(m: Migration, disk: PlannedDisk) -> str:
    """Return what to do where A's disk is not there any more: the fence has it open still, as a rule."""
    found, limit, on_a = None, m.plan.limits.command, m.state.disk(disk).on_a
    if m.fence:
        with suppress(MigrationError):
            found = await open_in(m.host_a, m.fence.pid, m.state.disk(disk).file, limit)
    if found is None:
        return f"put it back from a copy; then: {m.finish}"
    move = ["mv", "--no-clobber", "--", found.name, on_a]
    words = move if found.name else ["cp", "--sparse=always", "--", found.descriptor, on_a]
    back = pasted(m.host_a.typed(words))
    called = f"it is {found.name} now" if found.name else "the fence still has it open"
    return f"{called}; to have it back: {back}; then: {m.finish}"


async def different(m: Migration, first: int | None) -> str:
    """Return what to do where B's copy is not what A has: neither host can know which of the two is right."""
    look = "see that A's server tells hashes of blocks (nbdserve --block-hashes)"
    if first is not None:
        words = f"if=IMAGE bs=64K skip={first // (64 << 10)} count=1 status=none"
        look = f"look at the block on both hosts (dd {words} | sha256sum), at their memory and disks"
    return (
        f"A's image and its server are kept; {look}; to compare again: {m.finish}; to go on with what is "
        f"on B: {m.finish} --no-verify"
    )


async def bad_destination(m: Migration) -> str:
    """Return what to do where B's disk itself fails."""
    return f"mend B's disk (its kernel's log says more); then: {m.finish}"


async def no_space(m: Migration, missing: int) -> str:
    """Return what to do where there is no space left on B."""
    return f"{missing} bytes of the disk are still to come; when there is room: {m.finish}"


async def overlay_dead(m: Migration, disk: PlannedDisk) -> str:
    """nbd-overlay does not stay."""
    log = await m.place(m.host_b, disk.target, "overlay")
    return f"see in {log}.log on B why, and mend that; then: {m.finish}"


async def overlay_silent(m: Migration, disk: PlannedDisk) -> str:
    """nbd-overlay is there, but does not answer."""
    overlay = m.overlay(disk)
    if overlay is None:
        return f"see what it waits for; then: {m.finish}"
    kill = pasted(m.host_b.typed(["kill", "-9", str(overlay.pid)]))
    return f"see what it waits for; to kill it loses nothing that was written: {kill}; then: {m.finish}"


async def qemu_silent(m: Migration) -> str:
    """Return what to do where B's QEMU does not answer."""
    log = await m.place(m.host_b, m.disks[0].target, "qemu")
    return f"see what it waits for, {log}.log on B may say it; then: {m.finish}"


def paused(state: State) -> str:
    """Return what is to be known of a guest that came to B as somebody had paused it on A."""
    go_on = asking(state.plan.destination, "cont")
    return f"the guest came to B paused, as it was on A; its disk follows; to let it run: {go_on}"


def after_cut_over(m: Migration) -> str:
    """Return where the guest and its disk are behind the cut-over, as the table of decisions says it."""
    facts = Facts(OnA.LEFT, OnB.HAS_GUEST if m.has_guest else OnB.NONE)
    return told(decide(m.state.phase, Wish.GO_BACK, facts).words, m.state)
