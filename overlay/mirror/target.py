"""The other host's end of a mirror, as an export: a log that is written to, and applied to an image.

The export is no disk. Its first page tells where the next batch begins (a read), and takes the command that a
batch is whole (a write); what is written behind it is the log at that position (formats/redo/chunks.py).
So requests may come in any order, in pieces, twice, or from a connection that was given up: what is committed
has been checked, and a batch that is not whole never counts. A flush makes durable what was stored, and
commits nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from nbdserve.backends.base import Backend, Buffer, Capabilities
from nbdserve.common.errors import ImageError
from nbdserve.protocol.constants import Command
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BlockSizes
from overlay.formats.redo.chunks import PAGE, read_commit
from overlay.formats.redo.log import RedoLog

_SIZE = 1 << 62
"""Bytes of the export: more positions than are ever used."""


class MirrorTarget(Backend):
    """Takes batches over into the image of a log, which it does not own. Safe for several threads."""

    size = _SIZE
    capabilities = Capabilities(trim=False, zero=False, multi_conn=True)
    block_sizes = BlockSizes()

    def __init__(self, log: RedoLog) -> None:
        self._log = log

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Tell whose mirror it is, and where the next batch begins; OSError, EINVAL, for anything else."""
        if offset or len(buffer) != PAGE:
            raise OSError(
                errno.EINVAL, "the log of a mirror is not read; nbd-overlay info tells of its image"
            )
        buffer[:] = self._log.tell()

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store a part of a batch; a command has to wait."""
        if offset < PAGE:
            return False
        self._log.store(offset, data)
        return True

    def log_writes(self) -> None:
        """Do nothing: what is not committed is promised to nobody."""

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Store a part of a batch, or commit one, which is durable when this returns."""
        if offset >= PAGE:
            self._log.store(offset, data)
            if fua:
                self._log.sync()
            return
        command = read_commit(bytes(data)) if not offset else None
        if command is None:
            raise OSError(errno.EINVAL, "this is no command to a mirror")
        try:
            self._log.commit(command.source, command.position)
        except ImageError as error:
            raise OSError(errno.EIO, str(error)) from error

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Refuse: a log has none."""
        raise OSError(errno.EINVAL, "a mirror's log is only written to")

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Refuse: a log has none."""
        raise OSError(errno.EINVAL, "a mirror's log is only written to")

    def cache(self, offset: int, length: int) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Make durable what was stored."""
        self._log.sync()

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Tell nothing but that there are data."""
        yield Extent(length, 0)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Tell what waits for no sync."""
        return command is Command.READ or (command is Command.WRITE and offset >= PAGE)

    def close(self) -> None:
        """Do nothing: the log is closed by who has opened it."""
