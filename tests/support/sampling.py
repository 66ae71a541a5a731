"""Which tests `make test` runs, so that it stays short; `make test-all` runs every one.

@pytest.mark.sampled(3)                 the first, the middle and the last one of the test's cells
@pytest.mark.exhaustive                 none: other tests stand for this one
@pytest.mark.representative             in tests/vm, where each test starts guests: this one stands for others
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

WITH_GUESTS = Path(__file__).resolve().parent.parent / "vm"


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
    """Mark as exhaustive those tests with guests and cells of matrices that do not stand for others."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if WITH_GUESTS in item.path.parents and not item.get_closest_marker("representative"):
            item.add_marker("exhaustive")
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cells in tests.values():
        marker = cells[0].get_closest_marker("sampled")
        assert marker is not None
        kept = chosen(len(cells), *marker.args)
        for index, cell in enumerate(cells):
            if index not in kept:
                cell.add_marker("exhaustive")
