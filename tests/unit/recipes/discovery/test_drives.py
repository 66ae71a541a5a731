"""How a drive's file is named in a plan."""

from __future__ import annotations

import pytest

from recipes.discovery.drives import path_of


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("/dev//vg/./a", "/dev/vg/a"),
        ("//images/../a.raw", "/a.raw"),
        ("./a.raw", "/run/vm/a.raw"),
        ("nbd://a//b", "nbd://a//b"),
    ],
)
def test_a_file_is_named_as_a_plan_may_have_it(file: str, path: str) -> None:
    assert path_of(file, "/run/vm") == path
