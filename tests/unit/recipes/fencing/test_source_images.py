"""Which of the files under an image's two names on A is the image."""

from __future__ import annotations

import pytest

from recipes.fencing.source_images import place
from recipes.hosts.images import same_file
from recipes.migrate.state import Disk

OURS, AFTER_A_BOOT, ANOTHER = "inode 1:7 512", "inode 4:7 512", "inode 1:8 512"
HERE, AWAY = "/a.raw", "/a.raw.moved"


@pytest.mark.parametrize(
    ("known", "named", "moved", "marker", "found"),
    [
        (OURS, OURS, "", "", (HERE, OURS)),
        (OURS, "", OURS, ANOTHER, (AWAY, OURS)),
        (OURS, ANOTHER, OURS, ANOTHER, (AWAY, OURS)),
        (OURS, OURS, ANOTHER, ANOTHER, (HERE, OURS)),
        (OURS, "", AFTER_A_BOOT, ANOTHER, (AWAY, AFTER_A_BOOT)),
        # It was put back from a copy, or nobody knows what it was.
        (OURS, "", ANOTHER, ANOTHER, (AWAY, ANOTHER)),
        ("", ANOTHER, "", "", (HERE, ANOTHER)),
        ("", ANOTHER, OURS, "", (HERE, ANOTHER)),
        ("", ANOTHER, OURS, ANOTHER, (AWAY, OURS)),
        (OURS, "", "", ANOTHER, (AWAY, "")),
    ],
)
def test_the_image_is_known_by_its_number_or_else_by_its_marker(
    known: str, named: str, moved: str, marker: str, found: tuple[str, str]
) -> None:
    assert place(Disk(HERE, "/b.raw", 512, known, AWAY), named, moved, marker) == found


def test_a_block_device_keeps_its_name() -> None:
    disk = Disk("/dev/vg/data", "/b.raw", 512, "device 253:1 512")
    assert place(disk, "device 253:2 512", "", "") == ("/dev/vg/data", "device 253:2 512")


@pytest.mark.parametrize(("one", "other"), [("", OURS), (OURS, ""), (OURS, ANOTHER)])
def test_no_file_is_the_same_as_another(one: str, other: str) -> None:
    assert not same_file(one, other)
    assert same_file(OURS, OURS)
