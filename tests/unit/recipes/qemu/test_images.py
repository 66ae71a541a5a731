"""What QEMU says of images: their files behind its names, and what cannot be read without it."""

from __future__ import annotations

import json

import pytest

from recipes.qemu.images import Layer, chain_of, fault_in, file_of, snapshots_in

FILE = {"driver": "file", "filename": "/a"}
DEVICE = {"driver": "host_device", "filename": "/dev/x"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("/a.raw", "/a.raw"),
        ("nbd://h/x", "nbd://h/x"),
        ("json:" + json.dumps({"driver": "qcow2", "file": FILE}), "/a"),
        (
            "json:"
            + json.dumps({"driver": "qcow2", "file": FILE, "backing": {"driver": "raw", "file": "x"}}),
            "/a",
        ),
        ("json:" + json.dumps({"driver": "qcow2", "file": FILE, "backing": None}), "/a"),
        (
            "json:" + json.dumps({"driver": "raw", "file": DEVICE}),
            "/dev/x",
        ),
        ("json:" + json.dumps({"driver": "raw", "size": 512, "file": DEVICE}), "/dev/x"),
    ],
)
def test_the_file_of_an_image_is_found_in_the_name_that_qemu_has_for_it(name: str, file: str) -> None:
    assert file_of(name) == file


@pytest.mark.parametrize(
    "options",
    [
        # A part of the file, and what is not the bytes of a file.
        {"driver": "raw", "offset": 512, "file": FILE},
        {"driver": "raw", "size": 512, "file": FILE},
        {"driver": "raw", "offset": 512, "size": 512, "file": DEVICE},
        {"driver": "qcow2", "file": FILE, "lazy-refcounts": {}},
        {"driver": "raw", "file": {"driver": "nbd", "server.path": "/x"}},
        {"driver": "raw", "file": {**FILE, "offset": 1}},
        {"driver": "raw", "file": "a-node"},
        {"driver": "raw"},
    ],
)
def test_what_is_more_than_a_file_is_not_taken_for_one(options: object) -> None:
    name = "json:" + json.dumps(options)
    assert file_of(name) == name
    assert file_of("json:{") == "json:{"


def image(name: str, **more: object) -> dict[str, object]:
    """What QEMU tells of an image."""
    return {"filename": name, "format": "qcow2", **more}


def test_a_chain_is_told_from_above() -> None:
    base = {"filename": "/c", "format": "raw"}
    told = image("/a", **{"backing-image": image("/b", **{"backing-image": base})})
    assert chain_of(told) == [Layer("/a", "qcow2"), Layer("/b", "qcow2"), Layer("/c", "raw")]


def test_what_cannot_be_read_from_the_file_alone_is_said_wherever_in_the_chain_it_is() -> None:
    assert fault_in(image("/a")) == ""
    for details, words in (
        ({"data-file": "/d"}, "/b has its data in another file (/d)"),
        ({"encrypt": {"format": "luks"}}, "/b is encrypted, and its key is known to A's QEMU alone"),
        ({"corrupt": True}, "/b is marked as corrupt (qemu-img check -r)"),
    ):
        below = image("/b", **{"format-specific": {"type": "qcow2", "data": details}})
        assert fault_in(image("/a", **{"backing-image": below})) == words


def test_snapshots_are_known_by_their_names() -> None:
    assert snapshots_in(image("/a")) == []
    assert snapshots_in(image("/a", snapshots=[{"name": "one", "id": "1"}])) == ["one"]
