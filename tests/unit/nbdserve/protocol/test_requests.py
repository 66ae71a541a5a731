"""The checks on requests, the replies as bytes, and the map from errno to the wire."""

from __future__ import annotations

import errno
import struct

import pytest

from nbdserve.protocol.constants import Command, CommandFlags, NbdError, TransmissionFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.framing import Request, framing_of
from nbdserve.protocol.offers import BASE_ALLOCATION, Agreement, BlockSizes, Mode, Offer
from nbdserve.protocol.requests import choose_contexts, refusal, wire_error

ALL = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)
SIZE = 1_000_001
LONGEST = 64 << 20


def agreed(
    *, mode: Mode = Mode.STRUCTURED, size: int = SIZE, flags: TransmissionFlags = ALL, contexts: bool = True
) -> Agreement:
    offer = Offer("disk", size, flags, block_sizes=BlockSizes(1, 4096, LONGEST))
    return Agreement(offer, mode, ((1, BASE_ALLOCATION),) if contexts else ())


def error_of(agreement: Agreement, command: int, flags: int, offset: int, length: int) -> int:
    refused = refusal(agreement, Request(flags, command, 7, offset, length))
    return 0 if refused is None else refused[0]


RANGED = [
    Command.READ,
    Command.WRITE,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
]


@pytest.mark.parametrize("command", RANGED)
def test_a_request_must_fit_the_smallest_block_but_for_the_rest_of_an_odd_size(command: Command) -> None:
    offer = Offer("disk", SIZE, ALL, block_sizes=BlockSizes(512, 4096, LONGEST))
    agreement = Agreement(offer, Mode.STRUCTURED, ((1, BASE_ALLOCATION),))
    assert error_of(agreement, command, 0, 1024, 512) == 0
    assert error_of(agreement, command, 0, 1025, 512) == NbdError.EINVAL
    assert error_of(agreement, command, 0, 1024, 513) == NbdError.EINVAL
    last = SIZE // 512 * 512
    assert error_of(agreement, command, 0, last, SIZE - last) == 0


@pytest.mark.parametrize("command", RANGED)
def test_a_request_may_end_at_the_last_byte_and_not_one_further(command: Command) -> None:
    beyond = NbdError.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else NbdError.EINVAL
    assert error_of(agreed(), command, 0, SIZE - 10, 10) == 0
    assert error_of(agreed(), command, 0, SIZE - 10, 11) == beyond
    assert error_of(agreed(), command, 0, SIZE, 1) == beyond
    assert error_of(agreed(), command, 0, 2**64 - 1, 1) == beyond
    assert error_of(agreed(), command, 0, 2**64 - 1, LONGEST) == beyond


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_a_read_only_export_permits_no_change(command: Command) -> None:
    agreement = agreed(flags=ALL | TransmissionFlags.READ_ONLY)
    assert error_of(agreement, command, 0, 0, 10) == NbdError.EPERM


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_a_payload_is_limited_and_an_effect_length_is_not(command: Command) -> None:
    agreement = agreed(size=2**40)
    assert error_of(agreement, command, 0, 0, LONGEST) == 0
    chunked = NbdError.EOVERFLOW if command is Command.READ else NbdError.EINVAL
    assert error_of(agreement, command, 0, 0, LONGEST + 1) == chunked
    simple = agreed(size=2**40, mode=Mode.SIMPLE)
    assert error_of(simple, command, 0, 0, LONGEST + 1) == NbdError.EINVAL
    for effect in (Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS):
        assert error_of(agreement, effect, 0, 0, 2**32 - 1) == 0


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH])
def test_fua_is_accepted_on_any_command(command: Command) -> None:
    assert error_of(agreed(), command, CommandFlags.FUA, 0, 10) == 0


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.READ, CommandFlags.NO_HOLE),
        (Command.WRITE, CommandFlags.DF),
        (Command.WRITE_ZEROES, CommandFlags.REQ_ONE),
        (Command.BLOCK_STATUS, CommandFlags.FAST_ZERO),
        (Command.FLUSH, 1 << 15),
        (Command.RESIZE, 0),
        (77, 0),
    ],
)
def test_flags_and_commands_that_do_not_fit_are_invalid(command: int, flags: int) -> None:
    assert error_of(agreed(), command, flags, 0, 10) == NbdError.EINVAL


def test_df_needs_structured_replies() -> None:
    assert error_of(agreed(), Command.READ, CommandFlags.DF, 0, 10) == 0
    assert error_of(agreed(mode=Mode.SIMPLE), Command.READ, CommandFlags.DF, 0, 10) == NbdError.EINVAL


def test_block_status_needs_a_context_and_a_length() -> None:
    assert error_of(agreed(contexts=False), Command.BLOCK_STATUS, 0, 0, 10) == NbdError.EINVAL
    assert error_of(agreed(), Command.BLOCK_STATUS, 0, 0, 0) == NbdError.EINVAL


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (Command.TRIM, TransmissionFlags.SEND_TRIM),
        (Command.CACHE, TransmissionFlags.SEND_CACHE),
        (Command.WRITE_ZEROES, TransmissionFlags.SEND_WRITE_ZEROES),
    ],
)
def test_what_was_not_advertised_is_invalid(command: Command, flag: TransmissionFlags) -> None:
    assert error_of(agreed(flags=ALL & ~flag), command, 0, 0, 10) == NbdError.EINVAL


def test_a_fast_zero_that_was_not_advertised_is_invalid() -> None:
    agreement = agreed(flags=ALL & ~TransmissionFlags.SEND_FAST_ZERO)
    assert error_of(agreement, Command.WRITE_ZEROES, CommandFlags.FAST_ZERO, 0, 10) == NbdError.EINVAL


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, NbdError.EPERM),
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.ENOTSUP, NbdError.ENOTSUP),
        (errno.ECONNRESET, NbdError.EIO),
        (None, NbdError.EIO),
    ],
)
def test_every_errno_has_a_value_that_may_go_over_the_wire(number: int | None, error: NbdError) -> None:
    assert wire_error(number) is error


REQUEST = Request(0, Command.READ, 7, 512, 4096)


def frame(mode: Mode, what: str) -> bytes:
    """One reply of each kind, in one framing."""
    framing = framing_of(agreed(mode=mode))
    if what == "success":
        return framing.success(REQUEST)
    if what == "error":
        return framing.error(REQUEST, NbdError.EIO, "broken")
    if what == "hole":
        return framing.hole(REQUEST, 1024, 2048, done=False)
    if what == "status":
        return framing.block_status(REQUEST, 1, [Extent(4096, 0), Extent(8192, 3)], done=True)
    out = bytearray(framing.data_head)
    framing.put_data_head(out, 0, REQUEST.cookie, REQUEST.offset, 1024, 2048, 0)
    return bytes(out)


SIMPLE = 0x67446698
STRUCTURED = 0x668E33EF
EXTENDED = 0x6E8A278C


@pytest.mark.parametrize(
    ("mode", "what", "expected"),
    [
        (Mode.SIMPLE, "success", struct.pack(">IIQ", SIMPLE, 0, 7)),
        (Mode.SIMPLE, "error", struct.pack(">IIQ", SIMPLE, 5, 7)),
        (Mode.SIMPLE, "data", struct.pack(">IIQ", SIMPLE, 0, 7)),
        (Mode.STRUCTURED, "success", struct.pack(">IHHQI", STRUCTURED, 1, 0, 7, 0)),
        (Mode.STRUCTURED, "error", struct.pack(">IHHQIIH", STRUCTURED, 1, 0x8001, 7, 12, 5, 6) + b"broken"),
        (Mode.STRUCTURED, "data", struct.pack(">IHHQIQ", STRUCTURED, 0, 1, 7, 2056, 1024)),
        (Mode.STRUCTURED, "hole", struct.pack(">IHHQIQI", STRUCTURED, 0, 2, 7, 12, 1024, 2048)),
        (Mode.STRUCTURED, "status", struct.pack(">IHHQI5I", STRUCTURED, 1, 5, 7, 20, 1, 4096, 0, 8192, 3)),
        (Mode.EXTENDED, "success", struct.pack(">IHHQQQ", EXTENDED, 1, 0, 7, 512, 0)),
        (
            Mode.EXTENDED,
            "error",
            struct.pack(">IHHQQQIH", EXTENDED, 1, 0x8001, 7, 512, 12, 5, 6) + b"broken",
        ),
        (Mode.EXTENDED, "data", struct.pack(">IHHQQQQ", EXTENDED, 0, 1, 7, 512, 2056, 1024)),
        (Mode.EXTENDED, "hole", struct.pack(">IHHQQQQI", EXTENDED, 0, 2, 7, 512, 12, 1024, 2048)),
        (
            Mode.EXTENDED,
            "status",
            struct.pack(">IHHQQQII4Q", EXTENDED, 1, 6, 7, 512, 40, 1, 2, 4096, 0, 8192, 3),
        ),
    ],
)
def test_each_reply_is_framed_as_the_specification_says(mode: Mode, what: str, expected: bytes) -> None:
    assert frame(mode, what) == expected


def filtered(payload: bytes) -> tuple[Request, tuple[tuple[int, str], ...]] | None:
    flags = int(CommandFlags.PAYLOAD_LEN)
    request = Request(flags, Command.BLOCK_STATUS, 7, 512, len(payload))
    return choose_contexts(agreed(mode=Mode.EXTENDED), request, payload)


def test_a_block_status_payload_says_the_length_and_the_contexts() -> None:
    plain = Request(0, Command.BLOCK_STATUS, 7, 512, 4096)
    assert filtered(struct.pack(">QI", 4096, 1)) == (plain, ((1, BASE_ALLOCATION),))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack(">Q", 4096),
        struct.pack(">QII", 4096, 1, 1),
        struct.pack(">QI", 4096, 9),
        struct.pack(">QIH", 4096, 1, 0),
    ],
    ids=["empty", "none", "twice", "unknown", "ragged"],
)
def test_a_block_status_payload_that_does_not_fit_is_refused(payload: bytes) -> None:
    assert filtered(payload) is None
