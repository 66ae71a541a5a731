"""The map of an open flat image: header, bitmaps and log, and the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from threading import Lock
from uuid import UUID

from nbdserve.common.errors import ImageError
from overlay.formats.flat.changes import Changes
from overlay.formats.flat.grains import Grains
from overlay.formats.flat.header import Flag, Header
from overlay.formats.flat.log import Log, clear_log, read_log
from overlay.formats.storage import Storage


class Map:
    """A map. Its lock is that of its grains; the caller holds it but where another is said.

    ``_storing`` lets one thread after the other change the file; it is taken first where both are, and held
    while the map is synced, though never while the data is.
    """

    def __init__(self, file: Storage, header: Header, path: str, *, writable: bool, boot: UUID) -> None:
        """Believe the log if it is of this boot; if writable, say in the header who writes it from now on.

        Raises ImageError if the map is damaged or, to be written, must not be believed; OSError.
        """
        self._file, self._path = file, path
        self.grains = Grains(file, header, path)
        self._closed = False
        self._storing = Lock()
        self.failed = False
        """Whether a sync has failed, of the data or the map."""
        if header.flags & Flag.FAILED and writable:
            raise sync_failed(path)
        is_believed = header.boot == boot and not header.flags & Flag.FAILED
        records, lengths = read_log(file, header.generations) if is_believed else ([], (0, 0))
        for first, count in records:
            if first + count > header.grains:
                raise ImageError(f"{path}: damaged map: a record of its log is behind the disk's end")
            self.grains.set(first, first + count, written=True)
        flags = header.flags & ~int(Flag.CLEAN)
        if not header.flags & Flag.CLEAN:
            flags |= Flag.REOPENED if is_believed else Flag.UNCERTAIN
        self.header = replace(header, boot=boot, flags=flags)
        self._log = Log(file, header.generations, lengths)
        if writable:
            if not is_believed:
                clear_log(file)  # whatever generation its records claim
            self._write_header()
            self._sync()

    @property
    def is_full(self) -> bool:
        """Tell whether a flush must come before the next change. Not once the map has been given up."""
        return not self._closed and (self._log.is_full or self.grains.is_full)

    def note(self, first: int, end: int) -> None:
        """The guest wrote grains: a note for the log first, so that nobody finds the bits without it."""
        self._log.note(first, end - first)
        self.grains.set(first, end, written=True)

    @property
    def is_log_empty(self) -> bool:
        """Tell whether the log says nothing."""
        return self._log.is_empty

    @property
    def has_notes(self) -> bool:
        """Tell whether there are notes that the log's file lacks. Needs no lock."""
        return self._log.has_notes

    def write_notes(self) -> None:
        """Write them, so that what they tell of outlives us. Raises OSError."""
        self._log.write_notes()

    def drop_notes(self) -> None:
        """Nobody will need them: the data file alone is the disk."""
        self._log.drop_notes()

    def take_changes(self) -> Changes:
        """Return what the file lacks; the data must be synced before it is stored. See Grains."""
        self._log.retire()
        return self.grains.take_changes()

    def put_back(self, changes: Changes) -> None:
        """The file still lacks these. Takes the lock."""
        with self.grains.lock:
            self.grains.put_back(changes)

    def store(self, changes: Changes) -> None:
        """Make changes durable, and void what the log said of them. Takes the lock, but for no sync."""
        with self._storing:
            if changes.chunks:
                with self.grains.lock:
                    in_order = self.grains.has_order(changes)
                self.grains.store_pairs(changes)
                if in_order:
                    self._sync()
                self.grains.store_directory(changes)
            with self.grains.lock:
                if self._log.void():
                    self.header = replace(self.header, generations=self._log.generations)
                    self._write_header()
            if changes.chunks:
                self._sync()
            with self.grains.lock:
                self.grains.stored(changes)

    def forget(self, masks: Iterable[dict[int, bytearray | None]]) -> None:
        """Let grains be absent, durably; see Grains. The log must be empty. Takes the lock, but for no sync.

        No sync of the data is needed, which can take long: nothing becomes present by this.
        """
        parts: list[Changes] = []
        in_order = False
        with self._storing:
            try:
                for part in masks:
                    with self.grains.lock:
                        parts.append(self.grains.forget(part))
                        in_order |= self.grains.has_order(parts[-1])
                    self.grains.store_pairs(parts[-1])
                if in_order:
                    self._sync()
                for changes in parts:
                    self.grains.store_directory(changes)
                self._sync()
            except OSError:
                with self.grains.lock:
                    for changes in parts:
                        self.grains.put_back(changes)
                raise
            with self.grains.lock:
                for changes in parts:
                    self.grains.stored(changes)

    def mark_clean(self) -> None:
        """Say that it was closed in good order, after everything has been stored. Raises OSError."""
        self.header = replace(self.header, flags=self.header.flags | Flag.CLEAN)
        self._write_header()
        self._sync()

    def mark_redo(self, *, has_redo: bool) -> None:
        """Say whether a redo log belongs to the image, durably. Takes the lock. Raises OSError."""
        flags = self.header.flags & ~int(Flag.REDO)
        with self._storing, self.grains.lock:
            self.header = replace(self.header, flags=flags | Flag.REDO if has_redo else flags)
            self._write_header()
            self._sync()

    def mark_failed(self) -> None:
        """Take no more changes, and let the header say why, if it can."""
        self.failed = True
        self.header = replace(self.header, flags=self.header.flags | Flag.FAILED)
        with suppress(OSError):
            self._file.write(0, self.header.pack())

    def share(self) -> None:
        """Give the image locks back."""
        self._file.share()

    def give_up(self) -> None:
        """Nothing of it matters any more; its file stays open."""
        self._closed = True

    def close(self) -> None:
        """Give the map up, and its file back."""
        self.give_up()
        self._file.close()

    def _write_header(self) -> None:
        try:
            self._file.write(0, self.header.pack())
        except OSError:
            self.mark_failed()
            raise

    def _sync(self) -> None:
        try:
            self._file.sync()
        except OSError:
            self.mark_failed()
            raise


def sync_failed(path: str) -> ImageError:
    """Return the refusal to go on after a failed sync."""
    return ImageError(
        f"{path}: writing back to the disk has failed, and writes that were acknowledged may be lost; "
        f"if that is acceptable, nbd-overlay check --repair {path} lets the image be used again"
    )
