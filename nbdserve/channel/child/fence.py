"""The fence: once the guest is elsewhere no QEMU writes to its disks here, as long as they are served.

A ``cont`` of the QEMU that the guest has left would otherwise succeed, and the guest would run twice.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nbdserve.backends.imagelocks import EXCLUSIVE, ImageLocks, Permission
from nbdserve.common.errors import ImageError, reason_of
from nbdserve.common.threads import promised

_LOG = logging.getLogger("nbdserve")


class Fence:
    """QEMU's image locks on files, from ``stand`` to ``close``. Both may be called from any thread.

    It must not stand before the QEMU that the guest leaves has come to the end of its migration: where that
    fails it takes its disk back, and must be able to.
    """

    def __init__(self, images: Sequence[Path]) -> None:
        self._images = images
        self._lock = threading.Lock()
        """Held for moments only: the descriptors, which hold the locks."""
        self._held: list[int] | None = []
        self._stands = False

    def stand(self) -> None:
        """Take the locks, soon; what cannot be locked is logged. May be called again."""
        with self._lock:
            is_news, self._stands = not self._stands, True
        if is_news:
            for image in self._images:
                promised("fence", partial(self._lock_image, image))

    def close(self) -> None:
        """Give the locks back."""
        with self._lock:
            held, self._held = self._held or [], None
        for descriptor in held:
            os.close(descriptor)

    def _lock_image(self, image: Path) -> None:
        try:
            descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            _LOG.warning("%s: no fence: %s; never let a guest run on it here", image, reason_of(error))
            return
        try:
            ImageLocks(descriptor, str(image)).hold(Permission.NONE, EXCLUSIVE)
        except ImageError as error:
            os.close(descriptor)
            _LOG.warning("no fence: %s; never let a guest run on it here", error)
            return
        with self._lock:
            if self._held is not None:
                self._held.append(descriptor)
                _LOG.info("%s: fenced: no QEMU can write to it until this ends", image)
                return
        os.close(descriptor)
