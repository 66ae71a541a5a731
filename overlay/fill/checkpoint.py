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
    """Flushes and tidies an image in a thread of its own: nobody waits for the disk but who asked to."""

    def __init__(self, image: Image, interval: float = INTERVAL) -> None:
        self._image = image
        self._interval = interval
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

    def _run(self) -> None:
        flushed: int | None = None
        trouble = ""
        while True:
            try:
                self._image.tidy()
                local = self._image.local_bytes
                if flushed is not None and local != flushed:
                    self._image.flush()
                flushed, trouble = local, ""
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
