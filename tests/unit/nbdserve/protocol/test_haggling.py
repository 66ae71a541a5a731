"""Option haggling as bytes in, bytes out: each option, whole and byte by byte, well-formed and not."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.common.errors import ProtocolError
from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.haggling import (
    MAX_HELD_OPTION,
    MAX_OPTIONS,
    MAX_SKIPPED_OPTION,
    Encryption,
    Haggling,
    State,
)
from nbdserve.protocol.offers import BASE_ALLOCATION, BlockSizes, Mode, Offer
from tests.support import wire
from tests.support.wire import Option, OptionReply, Reply

FLAGS = TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH
DISK = Offer("disk", 1_000_001, FLAGS, description="the one disk", block_sizes=BlockSizes(1, 4096, 64 << 20))
SNOW = Offer("snow ☃", 512, FLAGS | TransmissionFlags.READ_ONLY)
CLIENT_FLAGS = struct.pack(">I", 3)


class TwoExports:
    """A catalog of two exports, of which the first is also the default."""

    def listing(self) -> list[tuple[str, str]]:
        return [(offer.name, offer.description) for offer in (DISK, SNOW)]

    def offer(self, name: str) -> Offer | None:
        return {"": DISK, DISK.name: DISK, SNOW.name: SNOW}.get(name)


def begun(*, structured_replies: bool = True, encryption: Encryption = Encryption.NONE) -> Haggling:
    """A handshake past the client flags."""
    haggling = Haggling(TwoExports(), structured_replies=structured_replies, encryption=encryption)
    assert haggling.receive(CLIENT_FLAGS) == b""
    return haggling


def parse(data: bytes) -> list[OptionReply]:
    """Cut the server's bytes into replies."""
    replies = []
    while data:
        magic, option, kind, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == wire.OPTION_REPLY_MAGIC
        body = data[wire.OPTION_REPLY.size :]
        assert len(body) >= length
        replies.append(OptionReply(option, kind, body[:length]))
        data = body[length:]
    return replies


def ask(haggling: Haggling, option: int, data: bytes = b"") -> list[OptionReply]:
    """Send one option and parse its replies, checking that each names the option."""
    replies = parse(haggling.receive(wire.option(option, data)))
    assert {reply.option for reply in replies} <= {option}
    return replies


def kinds(replies: list[OptionReply]) -> list[int]:
    return [reply.kind for reply in replies]


def with_structured() -> Haggling:
    haggling = begun()
    assert kinds(ask(haggling, Option.STRUCTURED_REPLY)) == [Reply.ACK]
    return haggling


def information(replies: list[OptionReply]) -> dict[int, bytes]:
    """The INFO replies of an exchange by their type."""
    found = [reply.data for reply in replies if reply.kind == Reply.INFO]
    return {struct.unpack(">H", data[:2])[0]: data[2:] for data in found}


def test_the_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    assert wire.GREETING.unpack(Haggling.greeting()) == (wire.NBDMAGIC, wire.IHAVEOPT, 3)


def test_unknown_client_flags_end_the_handshake() -> None:
    with pytest.raises(ProtocolError, match="client flags"):
        Haggling(TwoExports()).receive(struct.pack(">I", 4))


def test_go_agrees_on_the_export_and_tells_its_size_flags_and_block_sizes() -> None:
    haggling = begun()
    replies = ask(haggling, Option.GO, wire.export_query("disk"))
    assert replies[-1].kind == Reply.ACK
    assert information(replies) == {
        0: struct.pack(">QH", DISK.size, FLAGS),
        3: struct.pack(">III", 1, 4096, 64 << 20),
    }
    assert haggling.state is State.TRANSMISSION
    assert haggling.agreement is not None
    assert haggling.agreement.offer is DISK
    assert haggling.agreement.mode is Mode.SIMPLE


def test_info_says_the_same_as_go_and_stays_in_haggling() -> None:
    haggling = begun()
    query = wire.export_query("", (1, 2, 3, 77))
    told = ask(haggling, Option.INFO, query)
    assert haggling.state is State.OPTIONS
    assert information(told)[1] == b"disk"
    assert information(told)[2] == b"the one disk"
    assert [reply.data for reply in ask(haggling, Option.GO, query)] == [reply.data for reply in told]


def test_an_unknown_export_is_refused_and_haggling_goes_on() -> None:
    haggling = begun()
    for option in (Option.INFO, Option.GO):
        assert kinds(ask(haggling, option, wire.export_query("nothing"))) == [Reply.ERR_UNKNOWN]
    assert kinds(ask(haggling, Option.GO, wire.export_query("snow ☃")))[-1] == Reply.ACK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        wire.export_query("disk") + b"x",
        struct.pack(">I4sH", 4, b"disk", 2) + b"\0\1",
        struct.pack(">I4sH", 4, b"di\0k", 0),
        struct.pack(">I2sH", 2, b"\xff\xfe", 0),
        struct.pack(">I4097sH", 4097, b"d" * 4097, 0),
    ],
    ids=["empty", "cut", "short", "huge", "long", "items", "nul", "utf8", "name"],
)
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_a_malformed_export_query_is_invalid_and_the_next_option_is_understood(
    option: Option, data: bytes
) -> None:
    haggling = begun()
    assert kinds(ask(haggling, option, data)) == [Reply.ERR_INVALID]
    assert kinds(ask(haggling, Option.GO, wire.export_query("disk")))[-1] == Reply.ACK


def test_list_names_every_export_with_its_description() -> None:
    replies = ask(begun(), Option.LIST)
    assert kinds(replies) == [Reply.SERVER, Reply.SERVER, Reply.ACK]
    assert replies[0].data == struct.pack(">I", 4) + b"disk" + b"the one disk"
    assert replies[1].data[4:] == "snow ☃".encode()


@pytest.mark.parametrize("option", [Option.LIST, Option.STRUCTURED_REPLY])
def test_options_without_payload_refuse_one(option: Option) -> None:
    haggling = begun()
    assert kinds(ask(haggling, option, b"x")) == [Reply.ERR_INVALID]
    assert kinds(ask(haggling, option))[-1] == Reply.ACK


@pytest.mark.parametrize("zeroes", [True, False])
def test_export_name_answers_with_padding_only_if_the_client_wants_it(zeroes: bool) -> None:
    haggling = Haggling(TwoExports())
    haggling.receive(struct.pack(">I", 1 if zeroes else 3))
    answer = haggling.receive(wire.option(Option.EXPORT_NAME, b"disk"))
    assert answer == struct.pack(">QH", DISK.size, FLAGS) + bytes(124 if zeroes else 0)
    assert haggling.state is State.TRANSMISSION


@pytest.mark.parametrize("name", [b"nothing", b"\xff", b"d\0sk"])
def test_export_name_has_no_way_to_refuse_but_to_close(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        begun().receive(wire.option(Option.EXPORT_NAME, name))


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    haggling = begun()
    assert kinds(ask(haggling, Option.ABORT, b"junk")) == [Reply.ACK]
    assert haggling.state is State.CLOSED


@pytest.mark.parametrize("option", [Option.PEEK_EXPORT, 0, 99, 0xFFFFFFFF])
def test_an_unknown_option_is_unsupported_and_its_payload_skipped(option: int) -> None:
    haggling = begun()
    assert kinds(ask(haggling, option, b"some payload")) == [Reply.ERR_UNSUP]
    assert kinds(ask(haggling, Option.LIST))[-1] == Reply.ACK


def test_structured_replies_are_agreed_once_and_bring_df() -> None:
    haggling = with_structured()
    assert kinds(ask(haggling, Option.STRUCTURED_REPLY)) == [Reply.ERR_INVALID]
    replies = ask(haggling, Option.GO, wire.export_query("disk"))
    flags = struct.unpack(">QH", information(replies)[0])[1]
    assert flags == FLAGS | TransmissionFlags.SEND_DF
    assert haggling.agreement is not None
    assert haggling.agreement.mode is Mode.STRUCTURED


def test_structured_replies_can_be_withheld_and_meta_contexts_with_them() -> None:
    haggling = begun(structured_replies=False)
    assert kinds(ask(haggling, Option.STRUCTURED_REPLY)) == [Reply.ERR_UNSUP]
    query = wire.meta_query("disk", BASE_ALLOCATION)
    assert kinds(ask(haggling, Option.SET_META_CONTEXT, query)) == [Reply.ERR_INVALID]


@pytest.mark.parametrize("queries", [(), ("base:",), (BASE_ALLOCATION,), ("base:", BASE_ALLOCATION, "x:y")])
def test_listed_contexts_match_by_name_by_namespace_or_all(queries: tuple[str, ...]) -> None:
    replies = ask(with_structured(), Option.LIST_META_CONTEXT, wire.meta_query("disk", *queries))
    assert kinds(replies) == [Reply.META_CONTEXT, Reply.ACK]
    assert replies[0].data[4:] == BASE_ALLOCATION.encode()


@pytest.mark.parametrize("query", ["other:", "base", "base:alloc", "BASE:ALLOCATION", ""])
def test_unknown_contexts_are_ignored(query: str) -> None:
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert kinds(ask(with_structured(), option, wire.meta_query("disk", query))) == [Reply.ACK]


def test_a_context_that_is_set_twice_has_one_id_and_a_namespace_selects_none() -> None:
    haggling = with_structured()
    replies = ask(haggling, Option.SET_META_CONTEXT, wire.meta_query("disk", *[BASE_ALLOCATION] * 2))
    assert kinds(replies) == [Reply.META_CONTEXT, Reply.ACK]
    ask(haggling, Option.GO, wire.export_query("disk"))
    assert haggling.agreement is not None
    assert haggling.agreement.contexts == ((struct.unpack(">I", replies[0].data[:4])[0], BASE_ALLOCATION),)
    assert kinds(ask(with_structured(), Option.SET_META_CONTEXT, wire.meta_query("disk", "base:"))) == [
        Reply.ACK
    ]


@pytest.mark.parametrize(
    ("second", "answer"),
    [
        (wire.meta_query("nothing", BASE_ALLOCATION), Reply.ERR_UNKNOWN),
        (wire.meta_query("disk"), Reply.ACK),
        (wire.meta_query("snow ☃", BASE_ALLOCATION), Reply.ACK),
        (b"\0", Reply.ERR_INVALID),
        (wire.meta_query("disk", BASE_ALLOCATION)[:-1], Reply.ERR_INVALID),
        (wire.meta_query("disk", BASE_ALLOCATION) + b"x", Reply.ERR_INVALID),
    ],
    ids=["unknown", "none", "another export", "cut", "cut query", "trailing"],
)
def test_set_meta_context_replaces_the_earlier_set_even_when_it_fails(second: bytes, answer: Reply) -> None:
    haggling = with_structured()
    ask(haggling, Option.SET_META_CONTEXT, wire.meta_query("disk", BASE_ALLOCATION))
    assert kinds(ask(haggling, Option.SET_META_CONTEXT, second))[-1] == answer
    ask(haggling, Option.GO, wire.export_query("disk"))
    assert haggling.agreement is not None
    assert haggling.agreement.contexts == ()


def test_an_oversize_option_is_skipped_and_answered() -> None:
    haggling = begun()
    data = bytes(MAX_HELD_OPTION + 1)
    assert kinds(ask(haggling, Option.GO, data)) == [Reply.ERR_TOO_BIG]
    assert kinds(ask(haggling, 99, data)) == [Reply.ERR_UNSUP]
    assert kinds(ask(haggling, Option.LIST))[-1] == Reply.ACK


def test_where_tls_is_required_an_oversize_option_needs_it_too() -> None:
    haggling = begun(encryption=Encryption.REQUIRED)
    data = bytes(MAX_HELD_OPTION + 1)
    assert kinds(ask(haggling, Option.GO, data)) == [Reply.ERR_TLS_REQD]
    assert kinds(ask(haggling, 99, data)) == [Reply.ERR_TLS_REQD]
    assert kinds(ask(haggling, Option.STARTTLS, data)) == [Reply.ERR_TOO_BIG]
    assert kinds(ask(haggling, Option.STARTTLS)) == [Reply.ACK]


@pytest.mark.parametrize("flags", [0, 2])
def test_a_client_without_fixed_newstyle_gets_no_tls_and_is_not_served_where_it_is_required(
    flags: int,
) -> None:
    offered = Haggling(TwoExports(), encryption=Encryption.OFFERED)
    offered.receive(struct.pack(">I", flags))
    assert kinds(ask(offered, Option.STARTTLS)) == [Reply.ERR_POLICY]
    for option in (Option.LIST, Option.GO, Option.EXPORT_NAME, 99):
        required = Haggling(TwoExports(), encryption=Encryption.REQUIRED)
        required.receive(struct.pack(">I", flags))
        with pytest.raises(ProtocolError, match="TLS"):
            ask(required, option)


def test_an_option_too_long_to_skip_ends_the_handshake() -> None:
    with pytest.raises(ProtocolError, match="announces"):
        begun().receive(wire.option(Option.GO, length=MAX_SKIPPED_OPTION + 1))
    with pytest.raises(ProtocolError, match="announces"):
        begun().receive(wire.option(Option.EXPORT_NAME, length=MAX_HELD_OPTION + 1))


def test_a_client_may_not_haggle_for_ever() -> None:
    haggling = begun()
    for _ in range(MAX_OPTIONS):
        ask(haggling, Option.LIST)
    with pytest.raises(ProtocolError, match="options"):
        ask(haggling, Option.LIST)


def test_a_wrong_magic_ends_the_handshake() -> None:
    with pytest.raises(ProtocolError, match="IHAVEOPT"):
        begun().receive(b"GET / HTTP/1.1\r\n\r\n")


def test_what_follows_the_last_option_is_left_for_transmission() -> None:
    haggling = begun()
    haggling.receive(wire.option(Option.GO, wire.export_query("disk")) + b"a request")
    assert haggling.leftover == b"a request"


SESSION = b"".join(
    [
        CLIENT_FLAGS,
        wire.option(Option.STRUCTURED_REPLY),
        wire.option(99, b"unknown"),
        wire.option(Option.LIST, bytes(MAX_HELD_OPTION + 5)),
        wire.option(Option.LIST_META_CONTEXT, wire.meta_query("disk", "base:")),
        wire.option(Option.SET_META_CONTEXT, wire.meta_query("disk", BASE_ALLOCATION)),
        wire.option(Option.INFO, wire.export_query("nothing")),
        wire.option(Option.INFO, b"malformed"),
        wire.option(Option.GO, wire.export_query("disk", (1, 2))),
        b"leftover",
    ]
)


def transcript(pieces: list[bytes]) -> tuple[bytes, State, bytes]:
    """Everything that the server says to a session that arrives in these pieces, and where it ends."""
    haggling = Haggling(TwoExports())
    said = b"".join(haggling.receive(piece) for piece in pieces)
    return said, haggling.state, haggling.leftover


def test_a_session_that_arrives_byte_by_byte_gets_the_same_answers() -> None:
    whole = transcript([SESSION])
    assert whole[1:] == (State.TRANSMISSION, b"leftover")
    assert transcript([SESSION[i : i + 1] for i in range(len(SESSION))]) == whole


@given(st.lists(st.integers(0, len(SESSION)), max_size=20))
def test_a_session_that_arrives_in_any_pieces_gets_the_same_answers(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(SESSION)]
    assert transcript([SESSION[a:b] for a, b in pairwise(edges)]) == transcript([SESSION])


OPTION_BYTES = st.builds(
    lambda number, data, lie: wire.option(number, data, len(data) + lie),
    st.one_of(st.sampled_from(list(Option)), st.integers(0, 2**32 - 1)),
    st.one_of(
        st.binary(max_size=80),
        st.builds(wire.export_query, st.sampled_from(["", "disk", "no"]), st.just((0, 3, 9))),
        st.builds(wire.meta_query, st.sampled_from(["", "disk", "no"]), st.sampled_from(["base:", "x"])),
    ),
    st.sampled_from([0, 0, 0, 1, 100, 1 << 20]),
)


@given(st.lists(st.one_of(OPTION_BYTES, st.binary(max_size=40)), max_size=12))
def test_no_input_makes_the_handshake_fail_otherwise_than_by_protocol_error(pieces: list[bytes]) -> None:
    haggling = begun()
    for piece in pieces:
        try:
            haggling.receive(piece)
        except ProtocolError:
            return
        assert (haggling.agreement is not None) == (haggling.state is State.TRANSMISSION)
