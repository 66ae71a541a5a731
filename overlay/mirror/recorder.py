"""What a guest changes, noted in the order in which it reaches the image, until the mirror has it.

The notes are the records of a redo log (formats/redo/chunks.py), copies of what was written, of whole
grains, in chunks. A guest never waits for the mirror: when the notes have no room any more they are given up,
and what they told of is *dirty*. It is read from the image later, while the guest goes on and its changes are
noted again; these, put behind it, make all of it the disk as of the last of them. A batch that could not be
committed, for whatever reason, becomes dirty, too: there is no other way to repeat it.

So a batch is either notes up to one of the guest's flushes; or what was dirty, and all notes up to an instant
after that was read. Both are the disk as of an instant, which is what a crash leaves.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from overlay.formats.image import Buffer, Image, State
from overlay.formats.redo.chunks import DATA, GRAIN, LONGEST_DATA, RECORD, records, zero_records
from overlay.mirror.dirty import Dirty

CHUNK = 256 << 10
"""Bytes of notes that are put together at least, unless a flush comes before."""
WITHOUT_FLUSH = 1.0
"""Seconds after which what was noted is sent though the guest flushes nothing."""
_EAGER = 8
"""A share of the room for notes that is sent though the guest flushes nothing."""


@dataclass
class Batch:
    """Changes that are on their way to the mirror."""

    since: float
    """When the first of them was made, by time.monotonic()."""
    rounds: list[Dirty] = field(default_factory=list)
    """What is read from the image, one after the other."""
    chunks: list[bytearray] = field(default_factory=list)

    @property
    def noted(self) -> int:
        """Return how many bytes of notes it has."""
        return sum(map(len, self.chunks))


class Recorder:
    """Passes a guest's changes on to an image, and notes them. It owns no image.

    Safe for several threads. ``_order`` is held while a change is made and noted, so that those which overlap
    are noted as they reached the image; it is taken before the image's own locks. Who sends holds it for
    moments, and never while something is sent.
    """

    def __init__(self, image: Image, room: int) -> None:
        """``room`` is for how many bytes of notes there is memory.

        What was written before is dirty, all of it: nobody knows what of it was sent.
        """
        self._image, self._room = image, room
        self._order = threading.Lock()
        self._wake = threading.Event()
        self._open = bytearray()
        self._open_since = 0.0
        self._ready: deque[tuple[float, bytearray]] = deque()
        self._marked = 0
        """How many of these came before the guest's last flush."""
        self._held = 0
        self._batch: Batch | None = None
        self._is_noting = True
        self._dirty = Dirty(image.size)
        self._dirty_since = time.monotonic()
        if image.written_bytes or (image.local_bytes and self._tells_too_little):
            self._dirty.add(0, image.size)

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store data as the image does; see Image."""
        with self._order:
            try:
                done = self._image.write_now(offset, data)
            except BaseException:
                self._touch(offset, len(data))
                raise
            if done:
                self._note(offset, data)
            return done

    def write(self, offset: int, data: Buffer) -> bool:
        """Store data as the image does; see Image. No other change waits while it syncs."""
        while not self.write_now(offset, data):
            if self._image.needs_fetch(offset, len(data)):
                return False
            self._image.flush()  # so that its log has room
        return True

    def zero(self, offset: int, length: int) -> bool:
        """Make a range read as zeros, as the image does; see Image."""
        with self._order:
            try:
                done = self._image.zero(offset, length)
            except BaseException:
                self._touch(offset, length)
                raise
            if done:
                self._note_zero(offset, length)
            return done

    def flush(self) -> None:
        """Make every change durable that returned before, and let the mirror have a point here."""
        self._image.flush()
        with self._order:
            self._close_chunk()
            self._marked = len(self._ready)
            if self._marked:
                self._wake.set()

    @property
    def lag(self) -> tuple[int, float]:
        """Tell how many bytes of changes the mirror lacks, at most, and since when, in seconds."""
        with self._order:
            dirty = self._dirty.bytes
            began = [self._dirty_since] if self._dirty else []
            if self._batch is not None and (self._batch.rounds or self._batch.chunks):
                began.append(self._batch.since)
                dirty += sum(part.bytes for part in self._batch.rounds)
            began += [self._ready[0][0]] if self._ready else [self._open_since] if self._open else []
            held = self._held
        seconds = max(0.0, time.monotonic() - min(began)) if began else 0.0
        return held + min(dirty, self._image.local_bytes), seconds

    @property
    def is_behind(self) -> bool:
        """Tell whether what was written has to be read again."""
        batch = self._batch
        return bool(self._dirty) or (batch is not None and bool(batch.rounds))

    def wait(self, seconds: float) -> None:
        """Wait until something may be due, at most so long."""
        self._wake.wait(seconds)

    def stir(self) -> None:
        """Let who waits look again."""
        self._wake.set()

    def due_in(self) -> float | None:
        """Tell in how many seconds something has to be sent if the guest flushes nothing; None: nothing."""
        with self._order:
            self._wake.clear()
            if self._dirty or self._marked or self._held >= self._room // _EAGER:
                return 0.0
            if not (self._ready or self._open):
                return None
            since = self._ready[0][0] if self._ready else self._open_since
        return max(0.0, since + WITHOUT_FLUSH - time.monotonic())

    def begin(self) -> Batch:
        """Begin a batch, with what is dirty as its first round; from now on everything is noted."""
        with self._order:
            self._batch = Batch(time.monotonic())
            if self._dirty:
                self._batch.since = self._dirty_since
                self._take_dirty(self._batch)
            elif self._ready:
                self._batch.since = self._ready[0][0]
            elif self._open:
                self._batch.since = self._open_since
            return self._batch

    def take(self, batch: Batch) -> list[bytearray] | None:
        """Return the notes that end the batch; None where there is more that is dirty, its next round.

        To the guest's last flush if it is notes alone; else, as what was dirty has been read after that, all.
        """
        with self._order:
            if self._dirty:
                self._take_dirty(batch)
                return None
            if batch.rounds or not self._marked:
                self._close_chunk()
                self._marked = len(self._ready)
            taken = [self._ready.popleft()[1] for _ in range(self._marked)]
            self._marked = 0
            batch.chunks += taken
        return taken

    def committed(self, batch: Batch) -> None:
        """The mirror has it."""
        with self._order:
            self._held -= batch.noted
            self._batch = None

    def abandoned(self, batch: Batch) -> None:
        """The mirror does not have it, or may not: all of it is dirty."""
        with self._order:
            self._dirty_since = min(batch.since, self._dirty_since) if self._dirty else batch.since
            for part in batch.rounds:
                for offset, length in part.ranges():
                    self._dirty.add(offset, length)
            self._spill(batch.chunks)
            self._held -= batch.noted
            self._batch = None

    def written(self, offset: int, length: int) -> Iterator[tuple[int, int, State]]:
        """Yield what of a range the guest may have written: offset, length, and whether it is zeros."""
        everything = self._tells_too_little
        for run in self._image.runs(offset, length):
            if run.state is State.ABSENT or not (run.written or everything):
                continue
            # Where the file system's blocks are smaller, a grain with data in a part of it is data.
            begin, end, is_zero = run.offset, run.offset + run.length, run.state is State.ZERO
            begin, end = (-(-begin // GRAIN), end // GRAIN) if is_zero else (begin // GRAIN, -(-end // GRAIN))
            begin, end = begin * GRAIN, min(end * GRAIN, self._image.size)
            if is_zero and run.offset + run.length == self._image.size:
                end = self._image.size
            if begin < end:
                yield begin, end - begin, run.state

    @property
    def _tells_too_little(self) -> bool:
        """Whether the guest may have written more than the image records."""
        return self._image.hides_writes or not self._image.is_written_certain

    def _take_dirty(self, batch: Batch) -> None:
        """What is dirty is a batch's next round. What is written from now on is noted."""
        batch.rounds.append(self._dirty)
        self._dirty = Dirty(self._image.size)
        self._is_noting = True

    def _note(self, offset: int, data: Buffer) -> None:
        length = len(data)
        if (offset | length) % GRAIN:
            self._note_again(offset, length)
        elif length <= LONGEST_DATA:
            self._put(RECORD.pack(offset, length, DATA), data, offset, length)
        else:
            view = memoryview(data)
            for at in range(0, length, LONGEST_DATA):
                part = view[at : at + LONGEST_DATA]
                self._put(RECORD.pack(offset + at, len(part), DATA), part, offset + at, len(part))

    def _note_again(self, offset: int, length: int) -> None:
        """Note the whole grains of a range, as they are in the image now."""
        end = min(-(-(offset + length) // GRAIN) * GRAIN, self._image.size)
        for begin in range(offset - offset % GRAIN, end, LONGEST_DATA):
            try:
                part = memoryview(bytearray(min(LONGEST_DATA, end - begin)))
                is_here = self._image.read_now(begin, part)
            except (OSError, MemoryError):
                is_here = False
            if is_here:
                self._put(RECORD.pack(begin, len(part), DATA), part, begin, len(part))
            else:
                self._touch(begin, len(part))

    def _note_zero(self, offset: int, length: int) -> None:
        end = offset + length
        first = -(-offset // GRAIN) * GRAIN
        last = end if end == self._image.size else end - end % GRAIN
        if first >= last:
            self._note_again(offset, length)
            return
        self._put(zero_records(first, last - first), b"", offset, length)
        if offset < first:
            self._note_again(offset, first - offset)
        if last < end:
            self._note_again(last, end - last)

    def _put(self, record: bytes, data: Buffer, offset: int, length: int) -> None:
        """Append a note; where there is no room for it all notes are given up."""
        place = len(self._open)
        if self._is_noting and self._held + len(record) + len(data) <= self._room:
            if not place:
                self._open_since = time.monotonic()
                if not self._ready:
                    self._wake.set()
            try:
                self._open += record
                self._open += data
            except MemoryError:
                del self._open[place:]
            else:
                self._held += len(record) + len(data)
                if len(self._open) >= CHUNK:
                    self._close_chunk()
                    if self._held >= self._room // _EAGER:
                        self._wake.set()
                return
        if self._is_noting:
            self._give_up()
        self._touch(offset, length)

    def _close_chunk(self) -> None:
        if self._open:
            self._ready.append((self._open_since, self._open))
            self._open = bytearray()

    def _give_up(self) -> None:
        """There is no room for notes: what they told of is dirty. What a batch has taken stays its own."""
        self._close_chunk()
        self._is_noting = False
        chunks = [chunk for _, chunk in self._ready]
        if self._ready and not self._dirty:
            self._dirty_since = self._ready[0][0]
        self._spill(chunks)
        self._held -= sum(map(len, chunks))
        self._ready.clear()
        self._marked = 0

    def _spill(self, chunks: list[bytearray]) -> None:
        for chunk in chunks:
            for offset, length, _ in records(chunk, self._image.size):
                self._dirty.add(offset, length)

    def _touch(self, offset: int, length: int) -> None:
        """Nobody knows what of a range was changed, or it could not be noted."""
        if not self._dirty:
            self._dirty_since = time.monotonic()
        self._dirty.add(offset, length)
        self._wake.set()
