"""A disk in memory, and a stream that is a script: the server's loop without a file or a socket."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from nbdserve.backends.base import Backend, Buffer, Capabilities
from nbdserve.protocol.constants import Command
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BlockSizes


class MemoryBackend(Backend):
    """A disk of ``size`` bytes. Whatever touches ``bad`` (an offset in bytes) fails with EIO."""

    def __init__(self, size: int, bad: int | None = None) -> None:
        self.size = size
        self.content = bytearray(size)
        self.capabilities = Capabilities(cache=True, fast_zero=True, multi_conn=True)
        self.block_sizes = BlockSizes()
        self._bad = bad

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer."""
        self._touch(offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Store the data."""
        self._touch(offset, len(data))
        self.content[offset : offset + len(data)] = data

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer, unless a subclass has it wait."""
        if not self.is_local(Command.READ, offset, len(buffer)):
            return False
        self.read_into(offset, buffer)
        return True

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store the data, unless a subclass has it wait."""
        if not self.is_local(Command.WRITE, offset, len(data)):
            return False
        self.write(offset, data, fua=False)
        return True

    def log_writes(self) -> None:
        """Nothing: it is in memory in any case."""

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Store zeroes."""
        self._touch(offset, length)
        self.content[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Zero as well: a trim may do that."""
        self.zero(offset, length, fua, may_trim=True, fast=False)

    def cache(self, offset: int, length: int) -> None:
        """Nothing is closer than memory."""

    def flush(self) -> None:
        """Nothing lasts longer than memory."""

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Everything is data."""
        self._touch(offset, length)
        yield Extent(length, 0)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Everything is."""
        return True

    def close(self) -> None:
        """Nothing to let go of."""

    def _touch(self, offset: int, length: int) -> None:
        if self._bad is not None and offset <= self._bad < offset + length:
            raise OSError(errno.EIO, "a bad block")


class ScriptedStream:
    """Delivers a script in pieces of ``piece`` bytes, then ends; collects what is sent."""

    def __init__(self, script: bytes, piece: int) -> None:
        self.sent = bytearray()
        self._script = memoryview(script)
        self._piece = piece

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """The next piece, as far as it fits."""
        count = min(len(buffer), self._piece, len(self._script))
        buffer[:count] = self._script[:count]
        self._script = self._script[count:]
        return count

    def sendall(self, data: bytes | bytearray | memoryview, /) -> None:
        """Collect the data."""
        self.sent += data
