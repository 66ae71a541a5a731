"""When a disk is completed without its guest, and what is told of that one; see engines/unattended.py."""

from __future__ import annotations

from recipes.migrate.runtime import GuestEnd, Migration
from recipes.steps.causes import described


async def go_without_guest(m: Migration) -> None:
    """From now on the disk is all that is left to do: B's QEMU has ended."""
    if m.guest_end:
        m.report.note(f"{end_told(m.guest_end)}; its disk is completed without it")
    m.no_longer_need("B's QEMU")
    if m.b:
        await m.b.disconnect()
        m.b = None
    m.unattended = True


def end_told(end: GuestEnd) -> str:
    """Return what has become of the guest, for the operator."""
    return described(end.reason, "B") if end.reason else end.how
