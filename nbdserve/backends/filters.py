"""Backends that change how another backend works: what ``--cache`` and ``--detect-zeroes`` ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum

from nbdserve.backends.base import Backend, Buffer
from nbdserve.backends.splicing import FileRange
from nbdserve.protocol.constants import Command
from nbdserve.protocol.extents import Extent

_HEAD = 64
_ZEROES = bytes(1 << 20)


class Filter(Backend):
    """Passes everything on to the backend beneath, which it owns."""

    def __init__(self, beneath: Backend) -> None:
        self.beneath = beneath
        self.size = beneath.size
        self.capabilities = beneath.capabilities
        self.block_sizes = beneath.block_sizes
        self.contexts = beneath.contexts

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Do as beneath."""
        self.beneath.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Do as beneath."""
        self.beneath.write(offset, data, fua)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Do as beneath: no filter changes what is read."""
        return self.beneath.read_now(offset, buffer)

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Do as beneath."""
        return self.beneath.write_now(offset, data)

    def log_writes(self) -> None:
        """Do as beneath."""
        self.beneath.log_writes()

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Do as beneath."""
        self.beneath.zero(offset, length, fua, may_trim, fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Do as beneath."""
        self.beneath.trim(offset, length, fua)

    def cache(self, offset: int, length: int) -> None:
        """Do as beneath."""
        self.beneath.cache(offset, length)

    def flush(self) -> None:
        """Do as beneath."""
        self.beneath.flush()

    @property
    def unflushed(self) -> bool:
        """Do as beneath."""
        return self.beneath.unflushed

    @property
    def last_patience(self) -> float | None:
        """Do as beneath."""
        return self.beneath.last_patience

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Do as beneath."""
        return self.beneath.extents(offset, length, context)

    def reads_as_zeroes(self, offset: int, length: int) -> bool:
        """Do as beneath."""
        return self.beneath.reads_as_zeroes(offset, length)

    def file_range(self, offset: int) -> FileRange | None:
        """Do as beneath: no filter changes what is read."""
        return self.beneath.file_range(offset)

    def write_range(self, offset: int) -> FileRange | None:
        """Do as beneath."""
        return self.beneath.write_range(offset)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Do as beneath."""
        return self.beneath.is_local(command, offset, length)

    def needs_network(self, command: Command, offset: int, length: int) -> bool:
        """Do as beneath."""
        return self.beneath.needs_network(command, offset, length)

    def close(self) -> None:
        """Do as beneath."""
        self.beneath.close()


class WriteThrough(Filter):
    """Acknowledges no change before it is durable: ``--cache=writethrough`` and ``directsync``."""

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write durably."""
        self.beneath.write(offset, data, fua=True)

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Refuse: it waits for the disk."""
        return False

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Zero durably."""
        self.beneath.zero(offset, length, True, may_trim, fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim durably."""
        self.beneath.trim(offset, length, fua=True)

    def write_range(self, offset: int) -> FileRange | None:
        """Name none: writing is not all."""
        return None

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Say yes to what waits for no disk."""
        waits = command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)
        return not waits and self.beneath.is_local(command, offset, length)


class Unsafe(Filter):
    """Makes nothing durable, whatever the client asks: ``--cache=unsafe``."""

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write."""
        self.beneath.write(offset, data, fua=False)

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Zero."""
        self.beneath.zero(offset, length, False, may_trim, fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim."""
        self.beneath.trim(offset, length, fua=False)

    def flush(self) -> None:
        """Do nothing."""

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """A flush waits for nothing here."""
        return command == Command.FLUSH or self.beneath.is_local(command, offset, length)


class KeepSpace(Filter):
    """Gives no space back, whatever the client asks: ``--discard=ignore``."""

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Zero without holes."""
        self.beneath.zero(offset, length, fua, may_trim=False, fast=fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Do nothing."""
        if fua:
            self.flush()


class Fenced(Filter):
    """An image that no QEMU opens for writing while it is served. ``descriptor`` holds its locks."""

    def __init__(self, beneath: Backend, descriptor: int) -> None:
        super().__init__(beneath)
        self._descriptor = descriptor

    def close(self) -> None:
        """Let others write again."""
        super().close()
        os.close(self._descriptor)


class Caching(Enum):
    """What ``--cache`` asks for, by QEMU's names."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"

    @property
    def direct(self) -> bool:
        """Tell whether files are read and written past the page cache."""
        return self in (Caching.NONE, Caching.DIRECTSYNC)

    @property
    def durable(self) -> bool:
        """Nothing is acknowledged before it is durable."""
        return self in (Caching.WRITETHROUGH, Caching.DIRECTSYNC)


class DetectZeroes(Enum):
    """What becomes of a write whose whole payload is zeroes."""

    OFF = "off"
    ON = "on"
    """The range is zeroed, without giving the space back."""
    UNMAP = "unmap"
    """The range may become a hole."""


class ZeroDetector(Filter):
    """Turns writes of nothing but zeroes into zeroing: ``--detect-zeroes``. ``beneath`` must be able to."""

    def __init__(self, beneath: Backend, *, may_trim: bool) -> None:
        super().__init__(beneath)
        self._may_trim = may_trim

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write, or zero."""
        if _is_zero(memoryview(data)):
            self.beneath.zero(offset, len(data), fua, self._may_trim, fast=False)
        else:
            self.beneath.write(offset, data, fua)

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Do as beneath, but for zeroes: these go the ordinary way."""
        return not _is_zero(memoryview(data)) and self.beneath.write_now(offset, data)

    def write_range(self, offset: int) -> FileRange | None:
        """Name none: what is written has to be looked at."""
        return None


def _is_zero(data: memoryview) -> bool:
    """Whether there are only zeroes; most data shows at once that there are not."""
    if any(data[:_HEAD]):
        return False
    return all(
        data[start : start + len(_ZEROES)].tobytes() == _ZEROES[: len(data) - start]
        for start in range(0, len(data), len(_ZEROES))
    )
