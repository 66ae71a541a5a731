"""Commands of the operator's that a migration calls, as its plan names them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from nbdserve.common.errors import UsageError


class Hook(Enum):
    """A command of the operator's that a migration calls; the value is its key in the plan."""

    BEFORE_CUTOVER = "before_cutover"
    AFTER_CUTOVER = "after_cutover"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Hooks:
    """A command line for each; empty: there is none. They run on the host where nbd-migrate runs.

    before_cutover  before the RAM moves; where it fails the guest stays on A
    after_cutover   when the guest is on B
    done            when nothing on A is needed any more
    failed          when the migration has failed, or was given up
    """

    before_cutover: tuple[str, ...] = ()
    after_cutover: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def command(self, name: str) -> tuple[str, ...]:
        """Return the command of a hook; nothing where there is none."""
        return tuple(getattr(self, name))

    def check(self) -> None:
        """Raise UsageError for a command without a name."""
        for each in fields(self):
            command = getattr(self, each.name)
            if command and not command[0]:
                raise UsageError(f"hooks.{each.name}: the command has no name")
