"""The checks on requests, the replies as bytes, and the map from errno to the wire."""

from __future__ import annotations

import errno
import struct

import pytest

from nbdserve.protocol import messages
from nbdserve.protocol.constants import Command, CommandFlags, NbdError, TransmissionFlags
from nbdserve.protocol.messages import refusal, wire_error
from nbdserve.protocol.offers import BASE_ALLOCATION, Agreement, BlockSizes, Offer

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
    *, structured: bool = True, size: int = SIZE, flags: TransmissionFlags = ALL, contexts: bool = True
) -> Agreement:
    offer = Offer("disk", size, flags, block_sizes=BlockSizes(1, 4096, LONGEST))
    return Agreement(offer, structured, ((1, BASE_ALLOCATION),) if contexts else ())


def error_of(agreement: Agreement, command: int, flags: int, offset: int, length: int) -> int:
    refused = refusal(agreement, command, flags, offset, length)
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
    assert error_of(agreement, command, 0, 0, LONGEST + 1) == NbdError.EINVAL
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
    assert error_of(agreed(structured=False), Command.READ, CommandFlags.DF, 0, 10) == NbdError.EINVAL


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


def test_errors_carry_a_message_only_in_structured_replies() -> None:
    structured = messages.error_reply(agreed(), 7, NbdError.EIO, "the disk is broken")
    assert structured == struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, 7, 24) + struct.pack(">IH", 5, 18) + (
        b"the disk is broken"
    )
    simple = messages.error_reply(agreed(structured=False), 7, NbdError.EIO, "the disk is broken")
    assert simple == struct.pack(">IIQ", 0x67446698, 5, 7)


def test_a_block_status_chunk_lists_the_context_and_pairs_of_length_and_flags() -> None:
    chunk = messages.block_status(9, 1, [(4096, 0), (8192, 3)], done=True)
    assert chunk == struct.pack(">IHHQI", 0x668E33EF, 1, 5, 9, 20) + struct.pack(">5I", 1, 4096, 0, 8192, 3)
