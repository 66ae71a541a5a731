"""Every bit of the command flags on every command, in every framing, against proto.md.

"Clients MUST NOT set a command flag bit that is not documented for the particular command" (section "Command
flags"); such a request is EINVAL here, its payload is consumed, and it changes nothing.
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from tests.support.disks import random_bytes
from tests.support.servers import nbdserve
from tests.support.wire import Command, Flag, Wire, extended_request, request

CONTEXT = "base:allocation"
SIZE = 64 << 10
LENGTH = 512
UNKNOWN = (Command.RESIZE, 9, 99, 0xFFFF)
COMMANDS = [command for command in Command if command not in (Command.DISC, Command.RESIZE)]

DOCUMENTED = {
    Command.READ: Flag.FUA | Flag.DF,
    Command.WRITE: Flag.FUA,
    Command.FLUSH: Flag.FUA,
    Command.TRIM: Flag.FUA,
    Command.CACHE: Flag.FUA,
    Command.WRITE_ZEROES: Flag.FUA | Flag.NO_HOLE | Flag.FAST_ZERO,
    Command.BLOCK_STATUS: Flag.FUA | Flag.REQ_ONE,
}
"""What a command may carry; FUA any, as some clients set it on all. PAYLOAD_LEN is apart."""


def expected(framing: str, command: int, flags: int, *, payload: bool) -> bool:
    """Whether the document lets a command with these flags succeed, sent with or without a payload."""
    if command not in DOCUMENTED:
        return False
    allowed = int(DOCUMENTED[Command(command)])
    if framing == "simple":
        # No structured replies: neither block status nor "don't fragment".
        allowed &= ~int(Flag.DF)
        if command == Command.BLOCK_STATUS:
            return False
    if payload and framing == "extended":
        if command not in (Command.WRITE, Command.BLOCK_STATUS):
            return False
        allowed |= int(Flag.PAYLOAD_LEN)
    return not flags & ~allowed


def message(framing: str, command: int, flags: int, payload: bytes) -> bytes:
    """A request with its payload, if it has one."""
    if framing == "extended":
        # Its length is that of the payload where there is one.
        head = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, 1, 0, len(payload) or LENGTH)
        return head + payload
    return request(command, 0, LENGTH, cookie=1, flags=flags, data=payload)


def payloads(framing: str, command: int, context: int) -> list[bytes]:
    """What may follow a command's header: always the data of a write, with extended headers on any other."""
    data = b"w" * LENGTH
    if command == Command.WRITE:
        return [data]
    if framing != "extended":
        return [b""]
    return [b"", struct.pack(">QI", LENGTH, context) if command == Command.BLOCK_STATUS else data]


def error_of(wire: Wire, framing: str, command: int) -> int:
    """The error in the reply to the request; 0 for success."""
    if framing != "simple":
        last = wire.chunks()[-1]
        assert last.cookie == 1
        return last.error
    reply = wire.simple_reply()
    assert reply.cookie == 1
    if command == Command.READ and not reply.error:
        wire.receive(LENGTH)
    return reply.error


@pytest.mark.parametrize("framing", ["simple", "structured", "extended"])
@pytest.mark.parametrize("command", [*COMMANDS, *UNKNOWN])
def test_a_flag_that_is_not_documented_for_a_command_is_invalid_and_changes_nothing(
    tmp_path: Path, framing: str, command: int
) -> None:
    image = tmp_path / "disk.img"
    content = random_bytes(SIZE)
    image.write_bytes(content)
    flush = extended_request if framing == "extended" else request
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        contexts = () if framing == "simple" else (CONTEXT,)
        ids = wire.go(structured=framing != "simple", extended=framing == "extended", contexts=contexts)
        documented = int(DOCUMENTED.get(Command(command), 0)) if command in COMMANDS else 0
        for bit in range(16):
            for others in (0, documented):
                for payload in payloads(framing, command, ids[0] if ids else 0):
                    flags = others | 1 << bit
                    if framing == "extended" and (payload or flags & Flag.PAYLOAD_LEN):
                        if not payload:
                            # The flag announces a payload: without one it would be no request.
                            continue
                        flags |= Flag.PAYLOAD_LEN
                    wire.send(message(framing, command, flags, payload))
                    fits = expected(framing, command, flags, payload=bool(payload))
                    error = error_of(wire, framing, command)
                    assert error == (0 if fits else errno.EINVAL), (bit, hex(flags), len(payload))
                    wire.send(flush(Command.FLUSH, cookie=2))
                    last = wire.simple_reply() if framing == "simple" else wire.chunks()[-1]
                    assert (last.cookie, last.error) == (2, 0), "the stream is out of step"
                    if not fits:
                        assert image.read_bytes() == content, (bit, hex(flags))
                    elif command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
                        image.write_bytes(content)
