"""When the disk goes to B: after the guest, or mostly before it; and when the guest goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbdserve.common.errors import UsageError

POSTCOPY, HYBRID = "postcopy", "hybrid"
POLICIES = (POSTCOPY, HYBRID)

AUTO, WHEN_CONVERGED, AT_WINDOW, MANUAL = "auto", "when-converged", "at-window", "manual"
KINDS = (AUTO, WHEN_CONVERGED, f"{AT_WINDOW} SECONDS", MANUAL)

CONVERGED = 1.0
"""Seconds of copying that are left for the window, and not worth a round any more."""


@dataclass(frozen=True)
class Cutover:
    """When the guest goes to B, of policy hybrid.

    auto            when another round is not worth it: what is left is little, or the rounds no longer halve
    when-converged  when what is left is little: a second of copying at most
    at-window       when the window is expected to take at most ``window`` seconds
    manual          when ``nbd-migrate cutover`` says so, which it may in any case
    """

    kind: str = AUTO
    window: float = CONVERGED


def parse_cutover(text: str, where: str) -> Cutover:
    """Return what the text asks for. Raises UsageError, which begins with ``where``."""
    kind, _, number = text.strip().partition(" ")
    if kind in (AUTO, WHEN_CONVERGED, MANUAL) and not number:
        return Cutover(kind)
    try:
        seconds = float(number) if kind == AT_WINDOW else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{where}: {text!r} is none: write {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return Cutover(AT_WINDOW, seconds)
