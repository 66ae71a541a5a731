"""The vulnerable window as it stands: what the guest on B still needs of A, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.sizes import format_size
from recipes.migrate.journal import Told
from recipes.migrate.state import Phase, State

_OPEN = (Phase.ARRIVED, Phase.STREAM)


@dataclass(frozen=True)
class Window:
    """From the cut-over until A may be switched off.

    open     A is needed, as far as is known
    bytes    of the guest's disks that are not on stable storage on B; 0 when A may be switched off, None
             while nobody tells. When nobody is at work they may have become less since, and never more
    left     seconds until then, as the rate of late predicts; None while that is not known
    seconds  for which it was open, once it is not
    """

    open: bool
    bytes: int | None
    left: float | None
    seconds: float | None

    def described(self) -> str:
        """Return it as one line for the operator."""
        if self.seconds is not None:
            return f"closed after {self.seconds:.1f} s: nothing on A is needed, which may be switched off"
        if not self.open:
            return "closed: all is on stable storage on B; A is only compared with"
        if self.bytes is None:
            return "open: A is needed; how much is not on stable storage on B is not known"
        left = "" if self.left is None else f", for {self.left:.0f} s at this rate"
        return f"open: A is needed for {format_size(self.bytes)} that are not on stable storage on B{left}"


def window_of(state: State, told: Told | None, *, at_work: bool) -> Window | None:
    """Return the window of a migration, by what was ``told`` last of its progress.

    None where the guest has not come to B, or has gone back.
    """
    if not state.arrived:
        return None
    if state.complete:
        return Window(False, 0, 0.0, state.window)
    if state.phase not in _OPEN:
        return None
    stream = told.progress if told is not None and told.time >= state.arrived else None
    if stream is None:
        return Window(True, None, None, None)
    if stream.needed == 0:
        return Window(False, 0, 0.0, None)
    return Window(True, stream.needed, stream.left if at_work else None, None)
