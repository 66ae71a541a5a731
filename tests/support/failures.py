"""``python -m tests.support.failures PAGE``: write the failure matrix, failures_data.py, as a page."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class When(Enum):
    """Where a migration is when something fails: its six steps, and what is in them."""

    EXPORT = "1 export"
    OVERLAY = "2 overlay"
    LAUNCH = "3 launch"
    PRECOPY = "pre-copy"
    RAM = "4 RAM"
    SWITCH = "4 switch-over"
    STREAM = "5 stream"
    PIVOT = "6 pivot"
    END = "6 clean-up"


BEFORE = (When.EXPORT, When.OVERLAY, When.LAUNCH, When.PRECOPY, When.RAM)
"""The guest runs on A."""

LAST = (When.PIVOT, When.END)
"""Every block is on B."""


@dataclass(frozen=True)
class Outcome:
    """What follows.

    guest  what the guest sees, and where it is
    disk   what is on disk
    typed  what the operator types next
    waits  how long the guest waits
    """

    guest: str
    disk: str
    typed: str
    waits: str


@dataclass(frozen=True)
class Cell:
    """What follows from a failure at these times, and the tests of it, FILE::TEST in tests/, or why not."""

    when: tuple[When, ...]
    outcome: Outcome
    tests: tuple[str, ...] = ()
    why_not: str = ""


@dataclass(frozen=True)
class Component:
    """Something that fails, and how."""

    name: str
    cells: tuple[Cell, ...]


HEAD = """# What follows when something fails

Written by `make docs` from a table (`tests/support/failures_data.py`): what can fail in a migration, when,
what the guest sees of it, what is on disk, what is typed next, and how long the guest waits. Each row names
its tests, or says why there is none; a test sees that every component and every phase is there once, and that
the tests are. Who decides, and the lines that the operator reads, are in [decisions.md](decisions.md); the
commands, in [migrate.md](migrate.md).

In short: before the cut-over nothing is at stake, and the guest runs on, on A. After it, what is lost for a
while is a pause; B's own end is a crash of the guest, whose disk is whole as long as A's is there. A disk of
A that is destroyed in the window is the one thing that nothing here makes good.
"""


def page() -> str:
    """The page, as Markdown."""
    from tests.support.failures_data import COMPONENTS

    return "".join(itertools.chain([HEAD], *(_component(each) for each in COMPONENTS)))


def _component(component: Component) -> Iterator[str]:
    yield f"\n## {component.name}\n\n"
    yield "| when | the guest | on disk | typed next | it waits | tests |\n"
    yield f"| {' | '.join(['---'] * 6)} |\n"
    for cell in component.cells:
        when = "at any time" if len(cell.when) == len(When) else ", ".join(each.value for each in cell.when)
        tests = ", ".join(f"`{each}`" for each in cell.tests)
        named = " ".join(each for each in (tests, f"none: {cell.why_not}" if cell.why_not else "") if each)
        outcome = cell.outcome
        yield f"| {when} | {outcome.guest} | {outcome.disk} | {outcome.typed} | {outcome.waits} | {named} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
