"""Cutting a monitor's input into commands, and checking their arguments, without a socket."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu.qmp.error import ProtocolError

from nbdserve.qmp.dispatch import Command, CommandError
from nbdserve.qmp.framer import MAX_COMMAND, MAX_DEPTH, MAX_GARBAGE, Framer

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
objects = st.dictionaries(st.text(), values)


@settings(max_examples=40)
@given(
    st.lists(objects, max_size=5),
    st.integers(1, 50),
    st.sampled_from([None, 2]),
    st.sampled_from(["", "\n", " \r\n"]),
)
def test_objects_are_found_however_they_are_cut(
    sent: list[dict[str, object]], piece: int, indent: int | None, between: str
) -> None:
    data = between.join(json.dumps(value, indent=indent, ensure_ascii=False) for value in sent).encode()
    framer = Framer()
    found = [
        value for start in range(0, len(data), piece) for value in framer.feed(data[start : start + piece])
    ]
    assert [json.loads(value) for value in found] == sent


@given(st.lists(st.binary(max_size=40)))
def test_garbage_is_passed_on_or_kept_and_never_lost(pieces: list[bytes]) -> None:
    framer = Framer()
    try:
        found = b"".join(value for piece in pieces for value in framer.feed(piece))
    except ProtocolError:
        return
    sent = b"".join(pieces)
    position = 0
    for byte in found:
        position = sent.index(byte, position) + 1


@pytest.mark.parametrize(
    "endless",
    [
        b"x" * (MAX_GARBAGE + 1),
        b"{" + b" " * MAX_COMMAND,
        b'{"' + b"\\" * MAX_COMMAND,
        b"[" * (MAX_DEPTH + 1),
        b'{"a":' * (MAX_DEPTH + 1),
    ],
    ids=["garbage", "object", "string", "lists", "objects"],
)
@pytest.mark.parametrize("piece", [16, 1000])
def test_what_never_ends_is_refused_in_time(endless: bytes, piece: int) -> None:
    framer = Framer()

    def feed() -> None:
        for start in range(0, len(endless), piece):
            framer.feed(endless[start : start + piece])

    with pytest.raises(ProtocolError):
        feed()


def carry_out(
    node_name: str,
    type_: str = "nbd",
    count: int | None = None,
    deep: dict[str, object] | None = None,
    listed: list[str] | None = None,
    flag: bool = False,
) -> object:
    """A command with every kind of argument."""
    return [node_name, type_, count, deep, listed, flag]


def test_arguments_go_to_the_parameters_that_bear_their_names() -> None:
    command = Command(carry_out)
    assert command.run({"node-name": "n"}) == ["n", "nbd", None, None, None, False]
    given = {"node-name": "n", "type": "t", "count": 3, "deep": {"a": 1}, "listed": ["x"], "flag": True}
    assert command.run(given) == ["n", "t", 3, {"a": 1}, ["x"], True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Parameter 'node-name' is missing"),
        ({"node_name": "n"}, "Parameter 'node_name' is unexpected"),
        ({"node-name": 1}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": None}, "Invalid parameter type for 'node-name', expected: string"),
        ({"node-name": "n", "count": True}, "Invalid parameter type for 'count', expected: integer"),
        ({"node-name": "n", "count": 1.5}, "Invalid parameter type for 'count', expected: integer"),
        ({"node-name": "n", "flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
        ({"node-name": "n", "deep": []}, "Invalid parameter type for 'deep', expected: object"),
        ({"node-name": "n", "listed": {}}, "Invalid parameter type for 'listed', expected: array"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_qemus_words(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(CommandError) as refused:
        Command(carry_out).run(arguments)
    assert str(refused.value) == message
    assert refused.value.kind == "GenericError"
