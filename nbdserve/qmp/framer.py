"""Cuts what a monitor's client sends into JSON values. QEMU needs no line ends; its clients send none."""

from __future__ import annotations

import re

from qemu.qmp.error import ProtocolError

MAX_COMMAND = 1 << 20
"""The longest value in bytes."""
MAX_GARBAGE = 4096
"""The most bytes of what is no object and no list that are kept."""
MAX_DEPTH = 64
"""How deep objects and lists may be nested."""

_END_OF_GARBAGE = re.compile(rb"[\n{\[]")
_SIGNIFICANT = re.compile(rb'[{}\[\]"\\]')


class Framer:
    """Finds objects and lists by their brackets. What is neither is passed on as it is, by the line."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes and return the values that are complete.

        Raises ProtocolError when one is longer or deeper than is allowed: nothing after it can be understood.
        """
        self._buffer += data
        found = []
        while piece := self._next():
            found.append(piece)
        if len(self._buffer) > (MAX_COMMAND if self._depth else MAX_GARBAGE):
            raise ProtocolError("a command is too long")
        return found

    def _next(self) -> bytes | None:
        if not self._depth:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[":
                end = _END_OF_GARBAGE.search(self._buffer)
                return self._take(end.start()) if end else None
        return self._value()

    def _value(self) -> bytes | None:
        """Look for the end of the value that the buffer starts with, from where the last look ended."""
        position = self._scanned
        while match := _SIGNIFICANT.search(self._buffer, position):
            position = match.end()
            mark = match[0]
            if mark == b"\\":
                # What it escapes means nothing here, and may not have been received yet.
                position += 1
            elif mark == b'"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark in b"{[" else -1
                if not self._depth:
                    return self._take(position)
                if self._depth > MAX_DEPTH:
                    raise ProtocolError("a command is nested too deeply")
        self._scanned = max(position, len(self._buffer))
        return None

    def _take(self, length: int) -> bytes:
        piece = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._scanned = 0
        return piece
