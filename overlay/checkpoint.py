"""What was fetched becomes durable now and then, so that little is fetched twice after a power cut."""

from __future__ import annotations

import logging
import threading

from nbdserve.errors import ImageError
from nbdserve.threads import Thread
from overlay.image import Image

_LOG = logging.getLogger("nbd-overlay")

INTERVAL = 2.0
"""Seconds between two flushes while anything is being fetched."""


class Checkpoints:
    """Flushes an image in a thread of its own, so that nobody waits for the disk but who asked to."""

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
        flushed = self._image.local_bytes
        trouble = ""
        while not self._end.wait(self._interval):
            local = self._image.local_bytes
            if local == flushed:
                continue
            try:
                self._image.flush()
            except (OSError, ImageError) as error:
                # Guests are told by their own requests; here nobody waits for an answer.
                # It is tried again, as there may be room some day.
                if str(error) != trouble:
                    _LOG.error("what was fetched could not be made durable: %s", error)
                trouble = str(error)
            else:
                flushed, trouble = local, ""
