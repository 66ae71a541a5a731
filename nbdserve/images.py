"""Images are opened here: what the operator asked for becomes an export."""

from __future__ import annotations

import logging

from nbdserve.backends.file import FileBackend
from nbdserve.backends.imagelocks import READER, ImageLocks, Permission
from nbdserve.backends.probe import require_raw
from nbdserve.backends.slices import Slice
from nbdserve.config import ExportOptions, ImageOptions
from nbdserve.exports import Export

_LOG = logging.getLogger("nbdserve")


def open_export(wanted: ExportOptions, how: ImageOptions, identifier: str | None = None) -> Export:
    """Open one image, with QEMU's locks on it.

    Raises OperatorError or OSError, with nothing left open, when that is not possible.
    """
    if wanted.format is None:
        require_raw(wanted.path, wanted.offset)
        _LOG.info("%s: no format given, served as raw", wanted.path)
    part = Slice(wanted.offset)
    backend = FileBackend(wanted.path, read_only=wanted.read_only, part=part, discard=how.discard)
    try:
        # What qemu-nbd holds on a raw image; nobody may cut off what is being served.
        used = READER if wanted.read_only else READER | Permission.WRITE
        locks = ImageLocks(backend.fileno(), str(wanted.path))
        locks.hold(used, Permission.RESIZE)
        if how.fence:
            locks.fence()
        return Export(wanted.name, backend, wanted.description, identifier)
    except BaseException:
        backend.close()
        raise
