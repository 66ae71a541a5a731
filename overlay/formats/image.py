"""What an overlay image can do, whatever its layout. The rest of the overlay knows images only by this."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from types import TracebackType
from typing import NamedTuple, Self
from uuid import UUID

Buffer = bytes | bytearray | memoryview


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
    written: bool = False
    """The guest wrote it. False: it was copied from a backing, if the image ``is_written_certain``."""


@dataclass(frozen=True, slots=True)
class Backing:
    """Where the clusters come from that the image does not have."""

    name: str
    """A file's name or an NBD URI, as stored in the image."""

    raw: bool
    """Its bytes are the disk: no format may be guessed from them."""


class Image(ABC):
    """One open image. Offsets and lengths are in bytes of the guest's disk.

    Every method may be called from any thread. No lock that reads and writes take is held while data is made
    durable. Failures are OSError with an errno: EINVAL for a range outside the disk, EROFS for a
    change to an image open for reading, ENOSPC and the like from the file; ImageError for a damaged part of
    the image's tables. After a failed sync of the data every later change and sync is EIO; reads go on.

    Three kinds of change come in: the guest's (:meth:`write_now`, :meth:`write`, :meth:`zero`), what was
    fetched (:meth:`fill`, :meth:`fill_zero`), and what must be fetched again (:meth:`invalidate`). The
    guest's write wins over a fetch, whichever of the two is called first.
    """

    size: int
    """Size of the guest's disk, a multiple of 512."""

    cluster_size: int
    """The unit in which ranges change their state."""

    backings: tuple[Backing, ...]
    """Where what is absent can be had, all of the same content; () if the image needs none."""

    _path: str
    """The file's name, for messages."""

    map_path: str = ""
    """The file that belongs to the image beside its data; empty where there is none."""

    _writable: bool
    """Whether it is open for changes."""

    invalidations: int = 0
    """How often parts were made absent again: what was asked for before the last time may be out of date."""

    was_killed: bool = False
    """Whether who had it open for changes before was killed, and may have stored what is not recorded."""

    is_committed: bool = False
    """Whether what the guest wrote is in another disk, so that nothing of this one is of use any more."""

    uuid: UUID = UUID(int=0)
    """What no other image has; zero where the layout has none."""

    hides_writes: bool = False
    """Whether a guest may have read what is not recorded as ``written``, as who stored it was killed."""

    records_writer: bool = False
    """Whether the layout records what the guest wrote, so that runs are told as ``written``."""

    @property
    def is_written_certain(self) -> bool:
        """Tell whether what is here and not told as ``written`` was certainly copied from a backing.

        False where the layout records no writer, where no backing is needed any more, and after a power cut.
        """
        return False

    @property
    @abstractmethod
    def local_bytes(self) -> int:
        """Return the bytes of the disk that are not absent; all of it without a backing."""

    @property
    def written_bytes(self) -> int:
        """Return the bytes of clusters that the guest wrote, or that may be its: at most ``local_bytes``."""
        return self.local_bytes

    @property
    def complete(self) -> bool:
        """Tell whether nothing is absent."""
        return not self.backings or self.local_bytes == self.size

    @property
    def raw_fd(self) -> int | None:
        """Return the descriptor of a file that is the disk, byte for byte, and stays so; None if none is."""
        return None

    @abstractmethod
    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield the runs that make up a range, in order, neighbours differing in state, place or writer.

        Each piece is as it was at one instant between the call and its arrival.
        """

    @abstractmethod
    def is_local(self, offset: int, length: int) -> bool:
        """Tell whether no byte of a range is absent (in the backing)."""

    @abstractmethod
    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer and return True if the whole range is local; else False, the buffer undefined."""

    @abstractmethod
    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store the guest's data if it can be acknowledged without waiting for a sync or the backing.

        True: stored; after :meth:`log_writes` it outlives this process, though not yet a power cut. False:
        nothing has changed.
        """

    @abstractmethod
    def log_writes(self) -> None:
        """Return when all :meth:`write_now` that returned True before outlive this process. Never slow."""

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> bool:
        """Store the guest's data; it outlives this process after :meth:`commit`.

        False, and nothing has changed, if the data covers an absent cluster only in part: who calls fetches
        that first. The disk's last cluster is covered when all its bytes on the disk are.
        """

    @abstractmethod
    def zero(self, offset: int, length: int) -> bool:
        """Make a range read as zeros, storing none for whole clusters; otherwise as :meth:`write`."""

    @abstractmethod
    def fill(self, offset: int, data: Buffer, asked_at: int | None = None) -> int:
        """Store what was fetched, but only in clusters that are absent at that instant.

        ``asked_at`` is what :attr:`invalidations` was before it was asked for; unless it is the same now the
        data may be out of date, and nothing is stored. None: the backing never changes.
        The offset is aligned to the clusters, the end too or it is the disk's end; else EINVAL. Clusters of
        zeros are stored as such. Returns how many bytes became local.
        """

    @abstractmethod
    def fill_zero(self, offset: int, length: int, asked_at: int | None = None) -> int:
        """Do what :meth:`fill` does with zeros, of any length."""

    @abstractmethod
    def commit(self) -> None:
        """Return when all :meth:`write` and :meth:`zero` that returned before outlive this process."""

    @abstractmethod
    def flush(self) -> None:
        """Return when every change that returned before is durable."""

    @abstractmethod
    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Make the clusters that lie in ranges (offset, length), even in part, absent again, durably.

        For the time before the guest runs here: what it wrote would be lost. A read that is under way may
        still see the old bytes, but what was asked of the backing before is not stored any more (``asked_at``
        of :meth:`fill`). Whatever ends it in the middle, each cluster is absent or as it was. OSError, EBUSY,
        once the image is finished.
        """

    @abstractmethod
    def finish(self) -> None:
        """Cut the image loose from its backing, durably; it goes on working, and needs none from then on.

        Raises OSError, EBUSY, unless the image is complete. Nothing happens the second time.
        """

    @abstractmethod
    def tidy(self) -> None:
        """Try again to remove what is needed no more. Called now and then; says in the log why it cannot."""

    @abstractmethod
    def share(self) -> None:
        """Give the image locks back while the image stays open, so that another process can take over."""

    @abstractmethod
    def close(self) -> None:
        """Flush what was written and give the file back. OSError if that fails; closed it is in any case."""

    def read(self, offset: int, length: int) -> bytes:
        """Read a range that is local; OSError, ENODATA, if part of it is in the backing."""
        if length < 0:
            raise OSError(errno.EINVAL, f"a length of {length} bytes")
        data = bytearray(length)
        if not self.read_now(offset, memoryview(data)):
            raise OSError(errno.ENODATA, f"part of the {length} bytes at {offset} is in the backing")
        return bytes(data)

    def absent(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what of a range has to be fetched, in order; see :meth:`runs`."""
        if self.backings:
            for run in self.runs(offset, length):
                if run.state is State.ABSENT:
                    yield run.offset, run.length

    def needs_fetch(self, offset: int, length: int) -> bool:
        """Tell whether a change has to wait for a fetch, as it covers an absent cluster only in part."""
        return not all(self.is_local(edge, 1) for edge in self.edges(offset, length))

    def edges(self, offset: int, length: int) -> list[int]:
        """Tell a place in each of the clusters, at most two, that a range covers only in part.

        The disk's last cluster is covered when all its bytes on the disk are.
        """
        if not length:
            return []
        size, end = self.cluster_size, offset + length
        places = [offset] if offset % size else []
        if end % size and end < self.size:
            places.append(end - 1)
        return places

    def _check_range(self, offset: int, length: int) -> None:
        """Require a range that lies within the disk: else OSError, EINVAL."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} are not within the disk", self._path)

    def _check_change(self, offset: int, length: int) -> None:
        """Require that a range may be changed: else OSError, EROFS or EINVAL."""
        if not self._writable:
            raise OSError(errno.EROFS, "the image is open for reading only", self._path)
        self._check_range(offset, length)

    def _check_changes(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Require that ranges may be changed: else OSError, EROFS or EINVAL."""
        self._check_change(0, 0)
        # There may be very many, while a guest waits.
        if ranges and (
            min(ranges)[0] < 0 or min(map(itemgetter(1), ranges)) < 0 or max(map(sum, ranges)) > self.size
        ):
            for each in ranges:
                self._check_range(*each)

    def _is_stale(self, asked_at: int | None) -> bool:
        """Tell, under the image's lock, whether what was asked for then may be out of date."""
        return asked_at is not None and asked_at != self.invalidations

    def _check_fill(self, offset: int, length: int) -> None:
        """Require that a range may be changed, and is of whole clusters: else OSError, EROFS or EINVAL."""
        self._check_change(offset, length)
        end = offset + length
        if offset % self.cluster_size or (end % self.cluster_size and end < self.size):
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} are not whole clusters", self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def zero_runs(data: memoryview, step: int) -> Iterator[tuple[int, memoryview, bool]]:
    """Yield (offset, part, whether it is zeros): data cut where pieces of ``step`` bytes begin to differ."""
    # Only a piece that begins with a zero can be all zeros: most data is not looked at any further.
    heads = bytes(data[::step])
    is_zero = bytearray(len(heads))
    zeros = bytearray(step)
    number = heads.find(0)
    while number >= 0:
        piece = data[number * step : (number + 1) * step]
        # Compared from a bytearray it is one memcmp; memoryviews compare number by number.
        is_zero[number] = not piece[-1] and zeros[: len(piece)] == piece
        number = heads.find(0, number + 1)
    begin = 0
    while begin < len(is_zero):
        end = is_zero.find(not is_zero[begin], begin)
        end = len(is_zero) if end < 0 else end
        yield begin * step, data[begin * step : end * step], bool(is_zero[begin])
        begin = end
