"""A bounds-checked reader over the payload of one option."""

from __future__ import annotations

import struct

from nbdserve.common.errors import ProtocolError
from nbdserve.protocol.constants import MAX_STRING

_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")


class Reader:
    """Take fields off the front of a payload; anything that does not fit raises ProtocolError."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._position = 0

    def take(self, length: int) -> bytes:
        """Return the next ``length`` bytes."""
        end = self._position + length
        if end > len(self._payload):
            raise ProtocolError(f"{length} bytes announced, {len(self._payload) - self._position} are left")
        field = self._payload[self._position : end]
        self._position = end
        return field

    def uint16(self) -> int:
        """Return a 16-bit number in network byte order."""
        return int(_UINT16.unpack(self.take(_UINT16.size))[0])

    def uint32(self) -> int:
        """Return a 32-bit number in network byte order."""
        return int(_UINT32.unpack(self.take(_UINT32.size))[0])

    def string(self) -> str:
        """Return a string that its 32-bit length precedes: UTF-8 without NUL, at most 4096 bytes."""
        return decode_string(self.take(self.uint32()))

    def end(self) -> None:
        """Check that nothing is left."""
        left = len(self._payload) - self._position
        if left:
            raise ProtocolError(f"{left} bytes too many")


def decode_string(field: bytes) -> str:
    """Check and decode a string of the protocol: UTF-8, no NUL, at most 4096 bytes."""
    if len(field) > MAX_STRING:
        raise ProtocolError(f"a string of {len(field)} bytes is longer than {MAX_STRING}")
    if b"\0" in field:
        raise ProtocolError("a string contains a NUL byte")
    try:
        return field.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a string is not UTF-8") from error
