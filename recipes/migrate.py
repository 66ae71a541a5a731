"""The six steps in order, and what happens when one of them fails."""

from __future__ import annotations

from recipes.children import Children
from recipes.plan import Plan
from recipes.report import Outcome, Report


async def migrate(plan: Plan, report: Report, *, children: Children | None = None) -> Outcome:
    """Run the six steps; return when nothing on host A is needed any more.

    Without ``children``, the processes started here end with this one until the cut-over, and live on by
    themselves after it, as they carry the guest. With ``children`` (the caller's, as in the demo) they end
    with that block in any case.

    Raises UsageError or ConnectError when a check fails before anything was started, MigrationError, whose
    one line says where the guest is and what to do, when a step fails.
    """
    raise NotImplementedError
