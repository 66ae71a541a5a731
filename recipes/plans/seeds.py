"""What ``--seed`` says, which copy that B has already is of which disk; and ``--target``, where one goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from nbdserve.common.errors import UsageError
from recipes.plans.plan import Plan


def seeds_of(
    given: Iterable[str], names: Sequence[tuple[str, ...]], option: str = "--seed"
) -> dict[int, str]:
    """Return the file for each disk that has a seed, by its number; ``names`` are those of each disk.

    One disk's needs no name: FILE. Of several it is NODE=FILE. ``option`` is the one that says it. Raises
    UsageError.
    """
    found: dict[int, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        number = next((at for at, each in enumerate(names) if equals and name and name in each), None)
        if number is None:
            if len(names) > 1:
                known = ", ".join(each[0] for each in names)
                raise UsageError(
                    f"{option} {text}: there are several disks: write NODE=FILE, NODE is of {known}"
                )
            if equals and not text.startswith("/"):
                known = " or ".join(filter(None, names[0]))
                raise UsageError(f"{option} {text}: no disk is called {name!r}: NODE is {known}, or left out")
            number, file = 0, text
        if number in found:
            raise UsageError(f"{option} {text}: {names[number][0]} has one already")
        found[number] = file
    return found


def with_seeds(plan: Plan, given: Iterable[str]) -> Plan:
    """Return the plan with these seeds, which win over its own. Raises UsageError."""
    found = seeds_of(given, [(disk.drive, disk.node) for disk in plan.disks])
    if not found:
        return plan
    if not plan.disk:
        return replace(plan, destination=replace(plan.destination, seed=found[0]))
    disks = [replace(disk, seed=found.get(at, disk.seed)) for at, disk in enumerate(plan.disk)]
    return replace(plan, disk=tuple(disks))
