"""Journals of migrations that nobody has begun."""

from __future__ import annotations

import tempfile
from pathlib import Path

from recipes.migrate.journal import Journal
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source


def begun(
    directory: Path, a: str, phase: Phase = Phase.PREPARED, b: str = "/no.b", *, command: float = 1.0
) -> Journal:
    """A journal in the directory that has come to a phase; ``a`` and ``b`` are the QEMUs' monitors."""
    plan = Plan(
        Source(qmp=a, image="/no.raw"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), image="/no.img", qmp=b, migration="unix:/no"),
        limits=Limits(connect=1.0, command=command),
    )
    journal = Journal.begin("vm", Path(tempfile.mkdtemp(dir=directory)))
    disks = (Disk("/no.raw", "/no.img", 1 << 20),)
    journal.append(State("vm", plan, phase, disks=disks, finish="nbd-migrate finish"))
    return journal
