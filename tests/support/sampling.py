"""Which cells of a large matrix `make test` runs; `make test-all` runs every one.

@pytest.mark.sampled(3)                 the first, the middle and the last one of the test's cells
@pytest.mark.exhaustive                 none: other tests stand for this one
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def chosen(count: int, wanted: int) -> set[int]:
    """The indices, in ``range(count)``, of this many cells: the first and the last, and evenly between.

    >>> sorted(chosen(7, 3))
    [0, 3, 6]
    """
    if wanted >= count:
        return set(range(count))
    if wanted == 1:
        return {0}
    return {round(step * (count - 1) / (wanted - 1)) for step in range(wanted)}


def leave_out_the_others(items: Iterable[pytest.Item]) -> None:
    """Mark as exhaustive those cells of sampled tests that do not stand for others."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cells in tests.values():
        marker = cells[0].get_closest_marker("sampled")
        assert marker is not None
        kept = chosen(len(cells), *marker.args)
        for index, cell in enumerate(cells):
            if index not in kept:
                cell.add_marker("exhaustive")
