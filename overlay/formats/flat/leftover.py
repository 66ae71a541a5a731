"""The map of a disk that is complete: of no more use, and yet there until it can be removed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock

from overlay.formats.storage import Storage

_LOG = logging.getLogger("nbd-overlay")


class Leftover:
    """A map that is to be removed. Safe for several threads.

    Until it has been it stays open, so that its image locks keep it from becoming another image's. Where it
    is left behind the next who opens the image to write removes it.
    """

    def __init__(self, file: Storage, remove: Callable[[], None], path: str) -> None:
        """``remove`` lets the file disappear, durably; OSError when that fails. ``path`` is the map's."""
        self._file, self._remove, self._path = file, remove, path
        self._lock = Lock()
        self._is_there = True
        self._trouble = ""

    def remove(self) -> None:
        """Remove it, if it is still there. What keeps it is logged, once: the disk does not need that."""
        with self._lock:
            if not self._is_there:
                return
            try:
                self._remove()
            except OSError as error:
                if str(error) != self._trouble:
                    reason = error.strerror or error
                    _LOG.error("%s cannot be removed: %s; trying again", self._path, reason)
                self._trouble = str(error)
                return
            self._is_there = False
            self._file.close()
            if self._trouble:
                _LOG.info("%s has been removed", self._path)

    def close(self) -> None:
        """Try for the last time, and let go of it."""
        self.remove()
        with self._lock:
            if self._is_there:
                self._is_there = False
                self._file.close()
