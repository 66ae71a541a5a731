"""Images are opened here: what the operator asked for becomes an export."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nbdserve.backends.base import Backend
from nbdserve.backends.direct import DirectBackend
from nbdserve.backends.file import FileBackend
from nbdserve.backends.filters import (
    Caching,
    DetectZeroes,
    Fenced,
    KeepSpace,
    Unsafe,
    WriteThrough,
    ZeroDetector,
)
from nbdserve.backends.imagelocks import READER, ImageLocks, Permission
from nbdserve.backends.probe import require_raw
from nbdserve.common.errors import UsageError
from nbdserve.common.uri import NbdUri
from nbdserve.exports.export_options import ExportOptions, ImageOptions
from nbdserve.exports.half_committed import refuse_half_committed
from nbdserve.exports.moved_images import refuse_moved
from nbdserve.exports.served_exports import Export
from nbdserve.protocol.offers import Offer

_LOG = logging.getLogger("nbdserve")


def open_export(wanted: ExportOptions, how: ImageOptions, identifier: str | None = None) -> Export:
    """Open one image, with QEMU's locks on it.

    Raises OperatorError or OSError, with nothing left open, when that is not possible.
    """
    if isinstance(wanted.source, Path):
        _refuse_moved(wanted.source, read_only=wanted.read_only)
    if isinstance(wanted.source, NbdUri):
        backend = _open_nbd(wanted.source, wanted, how)
    elif wanted.format in (None, "raw"):
        backend = _open_raw(wanted.source, wanted, how)
    else:
        backend = _open_formatted(wanted.source, wanted.format, wanted, how)
    try:
        if wanted.read_only and not isinstance(wanted.source, NbdUri):
            # Who writes may be who commits; who only reads takes it for a disk.
            refuse_half_committed(backend.read_into, backend.size, str(wanted.source))
        return Export(wanted.name, backend, wanted.description, identifier, block_hashes=how.block_hashes)
    except BaseException:
        backend.close()
        raise


def _refuse_moved(path: Path, *, read_only: bool) -> None:
    """Raise ImageError for an image that is out of date; to read it where it is now harms nobody."""
    if not read_only or not path.exists():
        refuse_moved(path)


def describe(wanted: ExportOptions, how: ImageOptions) -> Offer:
    """Return what a raw image is as an export, without holding any lock. Raises what ``open_export`` does."""
    assert isinstance(wanted.source, Path)
    backend = _open_raw(wanted.source, wanted, how, locked=False)
    try:
        return Export(wanted.name, backend, wanted.description, block_hashes=how.block_hashes).offer
    finally:
        backend.close()


def _open_raw(path: Path, wanted: ExportOptions, how: ImageOptions, *, locked: bool = True) -> Backend:
    caching = how.caching_of(path, read_only=wanted.read_only)
    kind = DirectBackend if caching.direct else FileBackend
    links = wanted.follow_links
    backend = kind(
        path, read_only=wanted.read_only, part=wanted.part, discard=how.discard, follow_links=links
    )
    try:
        if wanted.format is None:
            require_raw(backend.fileno(), path, wanted.part.offset)
            if locked:
                _LOG.info("%s: no format given, served as raw", path)
        if locked:
            _lock(backend, wanted, how)
    except BaseException:
        backend.close()
        raise
    return _filtered(backend, how)


def _lock(backend: FileBackend, wanted: ExportOptions, how: ImageOptions) -> None:
    """Hold what qemu-nbd holds on a raw image; nobody may cut off what is being served."""
    used = READER if wanted.read_only else READER | Permission.WRITE
    locks = ImageLocks(backend.fileno(), str(backend.path))
    locks.hold(used, Permission.RESIZE)
    if how.fence:
        locks.fence()


def _open_formatted(path: Path, name: str, wanted: ExportOptions, how: ImageOptions) -> Backend:
    """An image with a format, as qemu-nbd serves it: it honours and holds the locks, too."""
    # Imported where it is used, as libnbd takes a lot of memory.
    from nbdserve.backends.qemu import Manner, open_qemu

    caching = how.caching_of(path, read_only=wanted.read_only)
    manner = Manner(
        format=name,
        read_only=wanted.read_only,
        discard="unmap" if how.discard else "ignore",
        detect_zeroes=None if how.detect_zeroes is DetectZeroes.OFF else how.detect_zeroes.value,
        cache=None if caching is Caching.WRITEBACK else caching.value,
        aio=how.aio,
    )
    backend = open_qemu(path, manner, part=wanted.part)
    if not how.fence:
        return backend
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fenced = Fenced(backend, descriptor)
    try:
        ImageLocks(descriptor, str(path)).fence()
    except BaseException:
        fenced.close()
        raise
    return fenced


def _open_nbd(uri: NbdUri, wanted: ExportOptions, how: ImageOptions) -> Backend:
    from nbdserve.backends.nbd import open_nbd

    if wanted.format not in (None, "raw"):
        raise UsageError(f"{uri}: the bytes of another server are served as they are: leave out the format")
    if how.fence:
        raise UsageError(f"{uri}: --fence locks files: use it where the image is")
    backend = open_nbd(uri, read_only=wanted.read_only, part=wanted.part, patience=how.patience)
    return _filtered(backend if how.discard else KeepSpace(backend), how)


def _filtered(backend: Backend, how: ImageOptions) -> Backend:
    """What the options ask for and the backend does not do by itself."""
    if how.caching is not None and how.caching.durable:
        backend = WriteThrough(backend)
    elif how.caching is Caching.UNSAFE:
        backend = Unsafe(backend)
    if how.detect_zeroes is not DetectZeroes.OFF and backend.capabilities.zero:
        backend = ZeroDetector(backend, may_trim=how.detect_zeroes is DetectZeroes.UNMAP)
    return backend
