"""What was fetched becomes durable now and then, so that little is fetched twice after a power cut."""

from __future__ import annotations

import logging
import threading

from nbdserve.common.errors import ImageError, reason_of
from nbdserve.common.threads import Thread
from overlay.formats.image import Image

_LOG = logging.getLogger("nbd-overlay")

INTERVAL = 2.0
"""Seconds between two flushes while anything is being fetched."""


class Checkpoints:
    """Flushes and tidies an image in a thread of its own: nobody waits for the disk but who asked to.

    Safe for several threads. ``_lock`` is held for moments only; the image's locks may be taken under it.
    """

    def __init__(self, image: Image, interval: float = INTERVAL) -> None:
        self._image = image
        self._interval = interval
        self._lock = threading.Lock()
        # Whether what an earlier process left is on stable storage is not known before the first flush.
        self._unstable = image.size
        """Bytes that were not here at the last flush, and what has been taken away since."""
        self._flushed: int | None = 0
        """What was local then; None where that has been taken away, and may have come again."""
        self._end = threading.Event()
        self._thread = Thread(self._run, "checkpoints")

    def start(self) -> None:
        """Flush from now on."""
        self._thread.start()

    def close(self) -> None:
        """Flush no more; the image itself flushes when it is closed."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def unstable_bytes(self) -> int:
        """Return how many bytes of the disk are not on stable storage here, at most; 0: it is all there.

        What was stored since the last flush counts as not there, though its guest may have flushed it itself.
        """
        with self._lock:
            return max(self._unstable, self._image.size - self._image.local_bytes)

    def taken_away(self, length: int) -> None:
        """Note that so many bytes, at most, have become absent; what comes in their place is not durable."""
        with self._lock:
            self._unstable = min(self._image.size, self._unstable + length)
            self._flushed = None

    def flush(self) -> None:
        """Make durable what is local now, if that has changed; raises what the image's flush does."""
        with self._lock:
            # Before the flush: what comes meanwhile may not be part of it.
            local, before, known = self._image.local_bytes, self._unstable, self._flushed
            if local == known:
                return
            self._flushed = local
        try:
            self._image.flush()
        except BaseException:
            with self._lock:
                self._flushed = None
            raise
        with self._lock:
            self._unstable = min(self._image.size, self._image.size - local + self._unstable - before)

    def _run(self) -> None:
        trouble = ""
        while True:
            try:
                self._image.tidy()
                self.flush()
                trouble = ""
            except Exception as error:  # noqa: BLE001 - it is tried again, as there may be room some day
                # Guests are told by their own requests; here nobody waits for an answer.
                reason = _reason(error)
                if reason != trouble:
                    _LOG.error("what was fetched could not be made durable: %s", reason)
                trouble = reason
            if self._end.wait(self._interval):
                return


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason_of(error)}"
    return reason_of(error) if isinstance(error, OSError | ImageError) else repr(error)
