"""The disk to which an overlay is committed: a raw file or block device of this host, or a writable export.

Writes may be under way when a method returns; what fails is raised by a later one, by :meth:`Target.flush` at
the latest. Failures are OSError with an errno.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbdserve.backends.probe import looks_like
from nbdserve.client import Client, connect
from nbdserve.client.flight import Window
from nbdserve.common.errors import ImageError
from nbdserve.common.uri import NbdUri
from nbdserve.exports.moved_images import refuse_moved
from nbdserve.protocol.constants import CommandFlags
from overlay.backing.reads import sectors
from overlay.formats.device.block_device import open_device
from overlay.formats.image import Buffer
from overlay.formats.storage import FileStorage, open_file

_AT_ONCE = 16
"""Requests that are under way at a server."""
_ZEROS_AT_ONCE = 64 << 20
"""Bytes of one request for zeros: the server may have to write them."""
_NONE = CommandFlags(0)
_GRAIN = 4096


class Target(ABC):
    """A disk that is written to, of ``size`` bytes; ``name`` is for messages."""

    name: str
    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Return what is there, once all writes have ended."""

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Write data, which must not change any more."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, and give its place back where that is possible."""

    @abstractmethod
    def flush(self) -> None:
        """Return when everything that was written is durable."""


class FileTarget(Target):
    """A raw file or a block device, which nobody else uses meanwhile; of a larger device the beginning."""

    def __init__(self, storage: FileStorage, path: Path, size: int) -> None:
        self.name = str(path)
        self._storage = storage
        # The disk's, not more: a device may be larger.
        self.size = min(storage.size(), size) if path.is_block_device() else storage.size()

    def read(self, offset: int, length: int) -> bytes:
        """Return what is there."""
        data = bytearray(length)
        self._storage.read_into(offset, memoryview(data))
        return bytes(data)

    def write(self, offset: int, data: Buffer) -> None:
        """Write data."""
        self._storage.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Punch a hole, or write zeros; a device in steps."""
        step = self._storage.zero_step
        for begin in range(offset, offset + length, step):
            self._storage.zero(begin, min(step, offset + length - begin))

    def flush(self) -> None:
        """Sync the file."""
        self._storage.sync()


class ServerTarget(Target):
    """A writable export, through one connection."""

    def __init__(self, client: Client) -> None:
        self.name, self.size = str(client.uri), client.size
        self._client = client
        self._window = Window(_AT_ONCE)

    def read(self, offset: int, length: int) -> bytes:
        """Return what the server has."""
        self._window.drain()
        return self._client.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """Send data, in requests as long as the server takes them."""
        view = memoryview(data)
        step = self._client.export.payload(len(view))
        for begin in range(0, len(view), step):
            self._window.make_room()
            part = view[begin : begin + step]
            self._window.add(self._client.start_write(offset + begin, part, _NONE), part)

    def zero(self, offset: int, length: int) -> None:
        """Ask for zeros; where the server knows no such request they are sent."""
        step, end = _ZEROS_AT_ONCE if self._client.export.zero else 1 << 20, offset + length
        for begin in range(offset, end, step):
            part = min(step, end - begin)
            if not self._client.export.zero:
                self.write(begin, bytes(part))
                continue
            self._window.make_room()
            self._window.add(self._client.start_zero(begin, part, _NONE))

    def flush(self) -> None:
        """Wait for everything, and have the server make it durable."""
        self._window.drain()
        self._client.start_flush().result()


@contextmanager
def opened(where: Path | NbdUri, size: int) -> Iterator[Target]:
    """Open the disk that has ``size`` bytes, for writing, until the block ends.

    Raises ImageError where it is in use, cannot be written to, has another size, or its guest has moved to
    another host; ConnectError, OSError.
    """
    if isinstance(where, NbdUri):
        with connect(where) as client:
            _refuse_server(client)
            target = ServerTarget(client)
            _require_size(target, size)
            yield target
        return
    refuse_moved(where)
    is_device = where.is_block_device()
    storage = (open_device if is_device else open_file)(where, writable=True)
    try:
        file = FileTarget(storage, where, size)
        if file.size != size and (found := looks_like(storage.read(0, 512))):
            raise ImageError(
                f"{where}: looks like a {found} image, whose disk only QEMU can write to: serve it, with "
                f"nbdserve -f {found} or qemu-nbd -f {found}, and name that export"
            )
        _require_size(file, size)
        yield file
    finally:
        storage.close()


def _refuse_server(client: Client) -> None:
    """Raise ImageError for an export that cannot take the disk, or not make it durable."""
    export = client.export
    if export.read_only:
        raise ImageError(f"{client.uri}: the export is read-only: serve it without -r for this")
    if not export.flush:
        raise ImageError(f"{client.uri}: the server knows no flush, so nothing is sure to be on its disk")
    if export.minimum_block > _GRAIN:
        raise ImageError(
            f"{client.uri}: the server takes blocks of {export.minimum_block} bytes only, and an overlay "
            f"records {_GRAIN}: serve the image with nbdserve"
        )


def _require_size(target: Target, size: int) -> None:
    if target.size == size:
        return
    if sectors(target.size) == size:
        raise ImageError(
            f"{target.name}: it has {target.size} bytes, no multiple of 512, and what the guest wrote behind "
            f"them would be lost: lengthen it (truncate --size {size}), then again"
        )
    raise ImageError(
        f"{target.name}: it has {target.size} bytes, and the overlay is of a disk of {size}: another disk"
    )
