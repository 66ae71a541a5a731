"""Who has the guest's disk on B until it is complete: B's QEMU itself, or nbd-overlay at a Unix socket.

    qemu      a QED image that QEMU opens, with copy-on-read, over the export; QEMU streams
    overlay   a raw file and its map, which nbd-overlay serves to QEMU; nbd-overlay streams, and when all is
              there QEMU pivots to the file

Both are told to stream by the same commands, on one monitor or the other.
"""

from __future__ import annotations

from recipes.engines.interface import Engine
from recipes.engines.overlay_engine import OverlayEngine
from recipes.engines.qemu_engine import QemuEngine
from recipes.engines.unattended import Unattended
from recipes.migrate.runtime import Migration
from recipes.plans.plan import Plan

ENGINES: dict[str, Engine] = {"qemu": QemuEngine(), "overlay": OverlayEngine()}


def engine_of(plan: Plan) -> Engine:
    """Return the engine that the plan names."""
    return ENGINES[plan.destination.engine]


def engine_for(m: Migration) -> Engine:
    """Return who has the disk now: nbd-overlay alone once the guest has ended on B."""
    engine = engine_of(m.plan)
    return Unattended(engine.layout) if m.unattended else engine
