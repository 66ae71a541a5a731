"""The log of a flat image: the guest's writes to new grains since the bitmaps in the file were written last.

A record, 16 bytes, says that a run of grains is present and was written by the guest:

byte  size
   0     6  the first grain
   6     4  how many
  10     6  generation

It is written after the data, before the write is acknowledged, often together with others, and not synced:
it is for who comes after a
killed process in the same boot, while the kernel still has what was written. After a power cut nothing
is known of the order in which data and records reached the disk, so the log is dropped.

The records of a half count up to the first one that is not of the half's generation. When the bitmaps are
about to be written, the log goes on in the other half; once they are, the first gets a new generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

from overlay.formats.flat.header import LOG_AT, LOG_HALF_BYTES
from overlay.formats.storage import Storage

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
RECORD_BYTES = 16
HALF_RECORDS = LOG_HALF_BYTES // RECORD_BYTES


class Log:
    """Appends to the log. The image puts its lock around every call."""

    def __init__(self, file: Storage, generations: tuple[int, int], lengths: tuple[int, int]) -> None:
        """Go on with what is there; ``lengths`` counts the records of the halves."""
        self._file = file
        self.generations = generations
        newer = int(generations[1] > generations[0])
        self._half = newer if lengths[newer] or not lengths[1 - newer] else 1 - newer
        self._length = lengths[self._half]
        self._notes = bytearray()
        """Records that the file lacks; counted in the length."""
        self._retired: int | None = 1 - self._half if lengths[1 - self._half] else None

    @property
    def is_full(self) -> bool:
        """Tell whether no record fits until the bitmaps have been written."""
        return self._length >= HALF_RECORDS

    @property
    def is_empty(self) -> bool:
        """Tell whether no record counts, and none is noted."""
        return not self._length and self._retired is None

    @property
    def has_notes(self) -> bool:
        """Tell whether the file lacks what was noted. Needs no lock."""
        return bool(self._notes)

    def note(self, first: int, count: int) -> None:
        """Note a write, to be written before it is acknowledged."""
        record = first | count << 48 | self.generations[self._half] << 80
        self._notes += record.to_bytes(RECORD_BYTES, "little")
        self._length += 1

    def write_notes(self) -> None:
        """Write what was noted. Raises OSError; then it is still to be written."""
        if self._notes:
            end = LOG_AT + self._half * LOG_HALF_BYTES + self._length * RECORD_BYTES
            self._file.write(end - len(self._notes), self._notes)
            # Not before: somebody else's write to the same grains relies on what it does not find here.
            self._notes.clear()

    def drop_notes(self) -> None:
        """What was noted need not be written any more."""
        self._notes.clear()

    def retire(self) -> None:
        """What has been logged is about to be written into the bitmaps: go on in the other half.

        Nothing happens while the other half is still retired, because writing the bitmaps failed. Raises
        OSError.
        """
        self.write_notes()
        if self._retired is None and self._length:
            self._retired = self._half
            self._half = 1 - self._half
            self._length = 0

    def void(self) -> bool:
        """The bitmaps have been written: the retired half no longer counts. Whether there was any."""
        if self._retired is None:
            return False
        new = max(self.generations) + 1
        first, second = self.generations
        self.generations = (new, second) if self._retired == 0 else (first, new)
        self._retired = None
        return True


def current_boot() -> UUID:
    """Return the kernel's boot id: the same until the page cache is lost; never, where there is none."""
    try:
        return UUID(_BOOT_ID.read_text().strip())
    except (OSError, ValueError):
        return uuid4()


def read_log(file: Storage, generations: tuple[int, int]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return the records that count, as (first grain, count), and how many each half has. Raises OSError."""
    halves = [list(_read_half(file, half, generation)) for half, generation in enumerate(generations)]
    return halves[0] + halves[1], (len(halves[0]), len(halves[1]))


def clear_log(file: Storage) -> None:
    """Let no record be left, of whatever generation."""
    file.write(LOG_AT, bytes(2 * LOG_HALF_BYTES))


def _read_half(file: Storage, half: int, generation: int) -> Iterator[tuple[int, int]]:
    begin = LOG_AT + half * LOG_HALF_BYTES
    step = min(1 << 16, LOG_HALF_BYTES)
    for place in range(begin, begin + LOG_HALF_BYTES, step):
        records = file.read(place, step)
        for i in range(0, step, RECORD_BYTES):
            record = int.from_bytes(records[i : i + RECORD_BYTES], "little")
            if record >> 80 != generation:
                return
            yield record & ((1 << 48) - 1), record >> 48 & ((1 << 32) - 1)
