"""What an overlay image can do, whatever its layout. The rest of the overlay knows images only by this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import NamedTuple, Self


class State(Enum):
    """Where the bytes of a cluster are."""

    DATA = "data"
    """Allocated: in the image's file."""

    ZERO = "zero"
    """Known to be zeros; nothing is stored."""

    ABSENT = "absent"
    """Not in the image: in the backing, or zeros without one."""


class Run(NamedTuple):
    """A range of the disk in one state; if that is DATA, in one piece of the image's file. All in bytes."""

    offset: int
    length: int
    state: State
    file_offset: int | None = None
    """Where the range begins in the image's file; None unless the state is DATA."""


@dataclass(frozen=True, slots=True)
class Backing:
    """Where the clusters come from that the image does not have."""

    name: str
    """A file's name or an NBD URI, as stored in the image."""

    raw: bool
    """Its bytes are the disk: no format may be guessed from them."""


class Image(ABC):
    """One open image. Offsets and lengths are in bytes of the guest's disk.

    Not safe for several threads: whoever shares an image puts a lock around it. A run of DATA stays where it
    is in the file, so its bytes can be read without that lock.
    """

    size: int
    """Size of the guest's disk, a multiple of 512."""

    cluster_size: int
    """The unit in which ranges change their state."""

    backing: Backing | None

    @abstractmethod
    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The runs that make up a range, in order, neighbours differing in state or place.

        Raises ImageError on reaching a damaged part of the image's tables.
        """

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Read a range that the image has. Absent clusters are zeros if there is no backing.

        Raises OSError, ENODATA if part of the range is in the backing, EIO if the file fails; ImageError like
        :meth:`runs`.
        """

    @abstractmethod
    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store data; a cluster that was absent or zero becomes allocated.

        Of a cluster that is in the backing the data must cover all that is on the disk (ENODATA otherwise):
        who writes less of it merges it with the backing first. The tables in the file tell of a new cluster
        after :meth:`commit`; this object knows it at once. Raises OSError, ImageError.
        """

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, storing none for whole clusters. Conditions and errors as in write."""

    @abstractmethod
    def commit(self) -> None:
        """Let the tables tell of every write so far, after making the data durable that they will point to.

        From then on the writes outlive this process, though not yet a power cut. Raises OSError; if the data
        could not be made durable the image takes no more writes.
        """

    @abstractmethod
    def flush(self) -> None:
        """Commit, and return when everything is durable. Raises OSError like :meth:`commit`."""

    @abstractmethod
    def close(self) -> None:
        """Flush what was written and give the file back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
