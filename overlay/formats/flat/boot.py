"""Which boot of the machine this is."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def current_boot() -> UUID:
    """Return the kernel's boot id: the same until the page cache is lost; never, where there is none."""
    try:
        return UUID(_BOOT_ID.read_text().strip())
    except (OSError, ValueError):
        return uuid4()
