"""The Backend interface: what an export is made of, whether a file, another server or an overlay.

All offsets and lengths are in bytes and lie inside the backend: the connection has checked them. Every method
may be called from several threads at once. Failures are ``OSError`` with an errno.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from nbdserve.backends.splicing import FileRange
from nbdserve.protocol.constants import Command
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BASE_ALLOCATION, BlockSizes

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do besides reading and writing."""

    read_only: bool = False
    flush: bool = True
    fua: bool = True
    trim: bool = True
    zero: bool = True
    fast_zero: bool = False
    cache: bool = False
    rotational: bool = False
    multi_conn: bool = False
    """A flush on one connection covers what was acknowledged on all of them."""


class Backend(ABC):
    """A disk."""

    size: int
    capabilities: Capabilities
    block_sizes: BlockSizes
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    """The meta contexts that ``extents`` can tell of."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from ``offset``; OSError when any byte of it cannot be read."""

    @abstractmethod
    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write all of ``data``; with ``fua`` return only when it is durable."""

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Do what ``read_into`` does, if that takes no waiting; False, with nothing done, if it may wait.

        Short reads are tried so in the connection's own thread, with nothing asked before; what is refused
        goes the way of all other requests. So it is with ``write_now``.
        """
        return False

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Do what ``write`` does without FUA, if that takes no waiting; False, with nothing done, if not.

        ``data`` is valid until this returns. It may be acknowledged after the next ``log_writes``.
        """
        return False

    @abstractmethod
    def log_writes(self) -> None:
        """Let what ``write_now`` has stored, on any connection, outlive this process.

        Called before replies are sent; quick when there is nothing to do. After an OSError nothing of it may
        be acknowledged.
        """

    @abstractmethod
    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Make the range read as zeroes; ``may_trim`` allows holes.

        ``fast`` raises OSError(ENOTSUP) before touching anything if it would be no faster than writing.
        """

    @abstractmethod
    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Give the range back; what it reads as afterwards is undefined."""

    @abstractmethod
    def cache(self, offset: int, length: int) -> None:
        """Bring the range closer, if that means anything here."""

    @abstractmethod
    def flush(self) -> None:
        """Make everything acknowledged before this call durable."""

    @property
    def unflushed(self) -> bool:
        """Tell whether there may be acknowledged changes that are not durable."""
        return True

    @property
    def last_patience(self) -> float | None:
        """Tell for how many seconds its last flush is waited for when the server ends.

        None, for as long as it takes, where a disk does it.
        """
        return None

    @abstractmethod
    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Yield the runs from ``offset`` on with their status in a meta context.

        They cover at least the first byte and may end before, but not after, the end of the disk.
        """

    def reads_as_zeroes(self, offset: int, length: int) -> bool:
        """Tell whether the whole range is known, at less than the cost of reading it, to hold only zeroes."""
        return False

    def file_range(self, offset: int) -> FileRange | None:
        """Tell where the bytes from ``offset`` on lie in a file, if a read does no more than to read it."""
        return None

    def write_range(self, offset: int) -> FileRange | None:
        """Tell where writes from ``offset`` on go in a file, if that is all that they do, apart from FUA."""
        return None

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Tell whether a request can be served at once, without waiting for a network or a slow device."""
        return True

    def needs_network(self, command: Command, offset: int, length: int) -> bool:
        """Tell whether a request that is not local may have to wait for another server, which may hang."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. The backend is not used afterwards."""
