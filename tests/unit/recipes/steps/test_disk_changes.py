"""What has become of A's image since step 1, as its host tells."""

from __future__ import annotations

import pytest

from recipes.plans.disks import PlannedDisk
from recipes.steps.cutover import file_change

BEFORE = "inode 1:2 1048576"


@pytest.mark.parametrize(
    ("now", "format_", "words"),
    [
        (BEFORE, "raw", ""),
        ("", "raw", "there is no /a on A any more"),
        ("inode 1:3 1048576", "raw", "/a on A is another file"),
        ("device 1:2 1048576", "raw", "/a on A is another file"),
        ("inode 1:2 512", "raw", "/a on A has 512 bytes and had 1048576"),
        ("inode 1:2 2097152", "raw", "/a on A has 2097152 bytes and had 1048576"),
        ("inode 1:2 2097152", "qcow2", ""),
        ("inode 1:3 1048576", "qcow2", "/a on A is another file"),
    ],
)
def test_a_file_that_is_another_one_or_of_another_length_is_told_of(
    now: str, format_: str, words: str
) -> None:
    disk = PlannedDisk("/a", "/b", "disk0", format=format_)
    change = file_change(disk, BEFORE, now)
    assert change.startswith(words)
    assert bool(change) == bool(words)
    assert file_change(disk, "", now) == "", "of a journal of before nothing is known"
