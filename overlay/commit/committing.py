"""The order in which overlays are committed to the disks that they lie over, all of them or none.

1.  Each overlay and its disk are opened, so that nobody else uses either, and compared: the size, and some of
    what was copied. Where the first 4 KiB are absent in the overlay they are fetched: it has all from then on
    that the mark hides.
2.  The mark (nbdserve/exports/half_committed.py) is written over the first 4 KiB of each disk, and flushed:
    now neither is the old disk any more.
3.  What the guest wrote is written, zeros as zeros; flushed.
4.  Each map says that its overlay was committed, durably: nothing writes to it, or commits it, any more.
5.  The first 4 KiB are written and flushed, the disk that was named first the last: it is the disk.

Killed at any instant, the same command begins anew: whatever has the mark is nobody's disk, and is written
again; what has its map's word (4) and no mark needs nothing. A disk of which the last step is done is its
guest's: to commit the overlay once more would take back what that has written since. The map's word alone
does not say to which disk: a copy of the overlay may have been committed to a copy of the disk.

What the guest wrote is what the map says, unless a killed nbd-overlay was followed by another, or the power
has failed and the image was used since: then a guest may have read, and have built upon, what was stored and
not recorded. All that is in the overlay is written then: what was copied is as in the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from nbdserve.common.errors import ImageError, reason_of
from nbdserve.common.uri import NbdUri
from nbdserve.exports.half_committed import MARK_BYTES, mark, mark_of
from overlay.commit.target import Target, opened
from overlay.formats.flat.header import Flag
from overlay.formats.flat.log import current_boot
from overlay.formats.flat.map import sync_failed
from overlay.formats.flat.open import assemble, mark_committed, open_parts
from overlay.formats.image import Image, Run, State
from overlay.formats.open import layout_of, open_image, real_path

_PIECE = 1 << 20
"""Bytes that are read and written at once."""
_SAMPLES = 16
"""Blocks of what was copied that are compared with the disk."""
_TOO_FEW = 3
"""Of which nothing can be told where any of them may be the guest's."""
_MOST_RUNS = 1024
"""Runs among which they are looked for."""

OnProgress = Callable[[int, int], None]
"""Called with the bytes that have been written, and all that are to be."""


@dataclass(frozen=True)
class Pair:
    """An overlay, and the disk that it lies over; ``map_file`` as for all that opens an image."""

    image: Path
    target: Path | NbdUri
    map_file: Path | None = None


@dataclass
class Outcome:
    """What was committed of one overlay; in bytes."""

    image: str
    target: str
    size: int
    data: int = 0
    zeros: int = 0
    was_committed: bool = False
    """The overlay had been committed before, and the disk is not half committed: nothing was done."""


def commit(pairs: Sequence[Pair], on_progress: OnProgress = lambda done, total: None) -> list[Outcome]:
    """Commit overlays to their disks; what was committed before is left as it is.

    Raises ImageError where something does not belong together, or is in use, before anything is changed;
    ConnectError and OSError, after which the same call goes on.
    """
    with ExitStack() as stack:
        works = [_Work(pair, stack) for pair in pairs]
        for work in works:
            work.keep_what_is_hidden()
        try:
            _write(works, on_progress)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}" if error.filename else reason_of(error)
            names = " and ".join(work.target.name for work in works)
            raise ImageError(
                f"{why}; nobody may use {names} until the same command has come to its end: see to that, and "
                "type it again"
            ) from error
    return [work.outcome for work in works]


def _write(works: Sequence[_Work], on_progress: OnProgress) -> None:
    """Do all that changes a disk."""
    todo = [work for work in works if not work.outcome.was_committed]
    for work in todo:
        work.mark()
    total = sum(run.length for work in todo for run in work.to_be_written())
    done = 0
    for work in todo:
        for length in work.copy():
            done += length
            on_progress(done, total)
    for work in todo:
        work.target.flush()
    for work in todo:
        work.give_up_overlay()
    # The one from which the guest boots is named first, as a rule.
    for work in reversed(todo):
        work.release()


class _Work:
    """One overlay and its disk, open."""

    def __init__(self, pair: Pair, stack: ExitStack) -> None:
        """Open both; ``stack`` closes them. Raises ImageError unless they belong together."""
        self._path, self._map = real_path(pair.image), pair.map_file
        self._open(stack)
        self.target: Target = stack.enter_context(opened(pair.target, self._image.size))
        self.outcome = Outcome(str(pair.image), self.target.name, self._image.size)
        self._first = min(MARK_BYTES, self._image.size)
        self._hidden = b""
        found = mark_of(self.target.read(0, self._first))
        if found not in (None, self._uuid):
            raise ImageError(
                f"{self.target.name}: half committed, from another overlay, {found}: commit that one first"
            )
        self._is_marked = found is not None
        self.outcome.was_committed = self._image.is_committed and not self._is_marked
        if not self.outcome.was_committed:
            self._require_same_disk()

    def _open(self, stack: ExitStack) -> None:
        """Open the overlay for reading: nobody writes to it until the last but one step."""
        path = self._path
        if layout_of(path, self._map) == "qed":
            raise ImageError(f"{path}: a QED image, which records no writer: qemu-img commit is for that")
        parts = open_parts(path, map_file=self._map)
        self._closing = stack.enter_context(ExitStack())
        self._closing.callback(parts.close)
        parts.check()
        header, trailer = parts.header, parts.trailer
        if header is None or trailer is None:
            raise ImageError(f"{path}: it is a complete disk, and needs no other: boot from it, or copy it")
        if header.flags & Flag.REDO:
            raise ImageError(
                f"{path}: a mirror, whose redo log comes first: nbd-overlay receive --finish {path}"
            )
        if (header.flags | trailer.flags) & Flag.FAILED:
            raise sync_failed(str(path))
        self._uuid: UUID = header.uuid
        self._takes_all = bool(header.flags & (Flag.UNCERTAIN | Flag.REOPENED))
        self._image: Image = assemble(
            parts, writable=False, boot=current_boot(), remove_map=lambda: None, size=None
        )

    def _require_same_disk(self) -> None:
        """Raise ImageError where what was copied is not what the disk has."""
        compared = same = 0
        for run in _some(self._image):
            data = self._image.read(run.offset, MARK_BYTES)
            if any(data):
                compared += 1
                same += self.target.read(run.offset, MARK_BYTES) == data
            if compared == _SAMPLES:
                break
        # What was under way when nbd-overlay was killed may lie unrecorded over copies.
        in_doubt = self._takes_all or self._image.was_killed
        if compared - same > (max(compared // 2, _TOO_FEW) if in_doubt else 0):
            raise ImageError(
                f"{self.target.name}: not the disk that {self._path} lies over: of {compared} blocks that "
                f"were copied from there {compared - same} differ; nothing was changed"
            )

    def keep_what_is_hidden(self) -> None:
        """See that the overlay has what the mark is going to lie over: from then on only it has that."""
        if self.outcome.was_committed or self._is_marked or self._image.is_local(0, self._first):
            return
        first = self.target.read(0, self._first)
        self._closing.close()
        with open_image(self._path, writable=True, layout="flat", map_file=self._map) as image:
            image.fill(0, first)
            image.flush()
        self._open(self._closing)

    def mark(self) -> None:
        """Say on the disk that it is half committed, before anything else of it changes."""
        if not self._image.is_local(0, self._first):
            raise ImageError(
                f"{self.target.name}: half committed, and {self._path} lacks its first {self._first} bytes, "
                "so it is not what this was begun with, but an older copy of that: take the right one"
            )
        self.target.write(0, mark(self._uuid, self._first))
        self.target.flush()

    def to_be_written(self) -> Iterator[Run]:
        """Yield what the guest has written, or may have, behind the mark."""
        for run in self._image.runs(self._first, self._image.size - self._first):
            if run.written or (self._takes_all and run.state is not State.ABSENT):
                yield run

    def copy(self) -> Iterator[int]:
        """Write it; yield how many bytes, after each piece."""
        for run in self.to_be_written():
            if run.state is State.ZERO:
                self.target.zero(run.offset, run.length)
                self.outcome.zeros += run.length
                yield run.length
                continue
            for begin in range(run.offset, run.offset + run.length, _PIECE):
                length = min(_PIECE, run.offset + run.length - begin)
                self.target.write(begin, self._image.read(begin, length))
                self.outcome.data += length
                yield length

    def give_up_overlay(self) -> None:
        """Say in the map that all of it is on the disk, but for what the mark lies over."""
        self._hidden = self._image.read(0, self._first)
        self._closing.close()
        mark_committed(self._path, self._map)

    def release(self) -> None:
        """Write the last of it in the place of the mark: from now on it is the guest's disk."""
        self.target.write(0, self._hidden)
        self.target.flush()


def _some(image: Image) -> Iterator[Run]:
    """Yield grains that were copied, and lie behind the mark, far apart where that is possible."""
    for count, run in enumerate(image.runs(MARK_BYTES, max(0, image.size - MARK_BYTES))):
        if count == _MOST_RUNS:
            return
        if run.state is State.DATA and not run.written and run.length >= MARK_BYTES:
            step = max(MARK_BYTES, run.length // _SAMPLES // MARK_BYTES * MARK_BYTES)
            for place in range(run.offset, run.offset + run.length - MARK_BYTES + 1, step):
                yield Run(place, MARK_BYTES, run.state)
