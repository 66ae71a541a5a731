"""What B has already gets another name there, and its own one back on the way back."""

from __future__ import annotations

from itertools import islice

import pytest

from recipes.discovery.naming import candidates, names


def test_only_what_is_taken_is_called_otherwise() -> None:
    paths = ["/run/a.qmp", "/run/b.qmp", "/run/a.qmp"]
    assert names(paths, []) == {}
    assert names(paths, ["/run/a.qmp", "/other"]) == {"/run/a.qmp": "/run/a.moved.qmp"}


@pytest.mark.parametrize(
    ("path", "others"),
    [
        ("/r/a.qmp", ["/r/a.moved.qmp", "/r/a.moved2.qmp"]),
        ("/r/a.moved.qmp", ["/r/a.qmp", "/r/a.moved.qmp"]),
        ("/r/a.moved2.qmp", ["/r/a.qmp", "/r/a.moved.qmp"]),
        ("/r.d/sock", ["/r.d/sock.moved", "/r.d/sock.moved2"]),
        ("/r/sock.moved", ["/r/sock", "/r/sock.moved.moved"]),
        ("/r/.hidden", ["/r/.hidden.moved"]),
    ],
)
def test_a_name_goes_back_to_what_it_was(path: str, others: list[str]) -> None:
    assert list(islice(candidates(path), len(others))) == others


def test_no_two_get_the_same_name() -> None:
    found = names(["/a", "/a.moved"], ["/a", "/a.moved"])
    assert len(set(found.values())) == 2
    assert not set(found.values()) & {"/a", "/a.moved"}
