"""QEMU's own syntax and JSON are the same mapping, and come back as they were written."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.arguments import parse


@pytest.mark.parametrize(
    ("text", "implied", "values"),
    [
        ("virtio-blk-pci,drive=d0", "driver", {"driver": "virtio-blk-pci", "drive": "d0"}),
        ("driver=raw,file.filename=/a,,b", "driver", {"driver": "raw", "file.filename": "/a,b"}),
        ("socket,id=c,path=/x,server,nowait", "backend", {
            "backend": "socket", "id": "c", "path": "/x", "server": "on", "wait": "off"
        }),
        ("/x,server=on,nodelay", "path", {"path": "/x", "server": "on", "nodelay": "on"}),
        ("a=b=c", "", {"a": "b=c"}),
        ("", "driver", {}),
        ('{"a": {"b": [1, {"c": true}]}, "d": {}}', "", {"a.b.0": 1, "a.b.1.c": True, "d": {}}),
    ],
)  # fmt: skip
def test_an_argument_is_taken_apart(text: str, implied: str, values: dict[str, object]) -> None:
    assert parse(text, implied).values == values


@pytest.mark.parametrize(
    "text",
    [
        "virtio-blk-pci,drive=d0,serial=a,,b",
        "driver=qcow2,file.filename=/a",
        '{"driver": "raw", "file": {"driver": "file", "filename": "/a", "list": [1, {"b": true}, []]}}',
    ],
)
def test_what_is_written_again_is_what_was_read(text: str) -> None:
    implied = "" if text.startswith("driver=") else "driver"
    assert str(parse(text, implied)) == text


def test_values_are_changed_and_taken_away_in_either_way_of_writing() -> None:
    changed = parse("ide-hd,drive=a,werror=report", "driver").having(drive="b,c", werror="stop")
    assert str(changed) == "ide-hd,drive=b,,c,werror=stop"
    json = parse('{"driver": "ide-hd", "drive": "a", "x": {"y": 1}}', "driver").without("x", "drive")
    assert str(json.having(write_cache="off")) == '{"driver": "ide-hd", "write-cache": "off"}'


def test_a_switch_is_on_in_all_its_spellings() -> None:
    assert all(parse(text).is_on("readonly") for text in ("readonly", "readonly=on", '{"readonly": true}'))
    assert not any(parse(text).is_on("readonly") for text in ("", "readonly=off", '{"readonly": false}'))


def test_json_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="is no JSON"):
        parse('{"driver": ')
