"""What the monitor of nbdserve can do: exports, clients, and the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future

from nbdserve.backends.offset import Slice
from nbdserve.backends.probe import FORMATS
from nbdserve.common.errors import OperatorError
from nbdserve.common.threads import promised
from nbdserve.common.uri import parse_uri
from nbdserve.connection.client_connection import Connection
from nbdserve.connection.listeners import Listener
from nbdserve.exports.export_options import ExportOptions, ImageOptions, source
from nbdserve.exports.images import open_export
from nbdserve.exports.served_exports import Export
from nbdserve.protocol.constants import Command, TransmissionFlags
from nbdserve.qmp.dispatch import CommandError, Handler
from nbdserve.qmp.endpoint import Monitor
from nbdserve.service.server import Server

_LOG = logging.getLogger("nbdserve")

MOST_RANGES = 1 << 14
"""Ranges of a dirty bitmap in one answer: as many as another monitor takes in one command."""


class Control:
    """The commands, by QEMU's names where QEMU has them, and ``x-`` names where it has not."""

    def __init__(self, server: Server, images: ImageOptions) -> None:
        self._server = server
        self._images = images
        self.end_reason = "host-signal"
        self.commands: dict[str, Handler] = {
            "query-block-exports": self._query_block_exports,
            "block-export-add": self._block_export_add,
            "block-export-del": self._block_export_del,
            "x-query-clients": self._query_clients,
            "x-disconnect-client": self._disconnect_client,
            "x-query-dirty-bitmap": self._query_dirty_bitmap,
            "quit": self._quit,
        }

    def _query_block_exports(self) -> object:
        return [_told_of_export(export) for export in self._server.exports.everything()]

    def _block_export_add(
        self,
        type_: str,
        id_: str,
        filename: str,
        name: str | None = None,
        writable: bool = False,
        format_: str | None = None,
        description: str = "",
        offset: int = 0,
        size: int | None = None,
    ) -> Future[None]:
        """Serve a file. QEMU names a node of its block graph here; this server has files."""
        if type_ != "nbd":
            raise CommandError(f"Invalid parameter '{type_}': the type of an export is nbd here")
        if format_ not in (None, *FORMATS):
            raise CommandError(f"Invalid parameter '{format_}': formats are {', '.join(FORMATS)}")
        if not 0 <= offset < 1 << 63:
            raise CommandError(f"Invalid parameter '{offset}': an offset is 0 or more bytes")
        if size is not None and not 0 <= size < 1 << 63:
            raise CommandError(f"Invalid parameter '{size}': a size is 0 or more bytes")
        if self._images.fence and writable:
            raise CommandError("with --fence exports are read-only")
        wanted = ExportOptions(
            id_ if name is None else name,
            source(filename),
            format_,
            not writable,
            description,
            Slice(offset, size),
        )
        return promised(f"open {filename}", lambda: self._add(wanted, id_))

    def _add(self, wanted: ExportOptions, identifier: str) -> None:
        export = open_export(wanted, self._images, identifier)
        try:
            self._server.exports.add(export)
        except OperatorError:
            export.close()
            raise
        _LOG.info("export %r added: %s", export.name, wanted.source)

    def _block_export_del(self, id_: str, mode: str = "safe") -> Future[None]:
        if mode not in ("safe", "hard"):
            raise CommandError(f"Invalid parameter '{mode}': modes are safe and hard")
        exports = self._server.exports
        return promised(f"close {id_}", lambda: exports.remove(id_, hard=mode == "hard"))

    def _query_clients(self) -> object:
        return [_told_of_client(client) for client in self._server.clients.everyone()]

    def _disconnect_client(self, id_: int) -> None:
        for client in self._server.clients.everyone():
            if client.number == id_:
                client.cut("disconnected through the monitor")
                return
        raise CommandError(f"there is no client {id_}: see x-query-clients")

    def _query_dirty_bitmap(self, filename: str, bitmap: str, offset: int = 0) -> Future[dict[str, object]]:
        """Read a bitmap where it is, which may be far from who asks. Waits for the server that has it."""
        if not 0 <= offset < 1 << 63:
            raise CommandError(f"Invalid parameter '{offset}': an offset is 0 or more bytes")
        uri = parse_uri(filename)
        # Local images are served, with a monitor, where there is no libnbd.
        from nbdserve.monitor.dirty_bitmap import read_dirty_bitmap

        def read() -> dict[str, object]:
            told = read_dirty_bitmap(uri, bitmap, offset, MOST_RANGES)
            return {"size": told.size, "ranges": told.ranges, "next": told.end}

        return promised(f"read {bitmap}", read)

    def _quit(self) -> None:
        self.end_reason = "host-qmp-quit"
        _LOG.info("told to quit through the monitor")
        self._server.stop()


@contextlib.contextmanager
def served(server: Server, listener: Listener, images: ImageOptions) -> Iterator[None]:
    """Serve the monitor on this socket until the server has ended."""
    control = Control(server, images)
    monitor = Monitor(listener, "nbdserve", control.commands)

    def tell(export: Export) -> None:
        _LOG.info("export %r removed", export.name)
        monitor.emit("BLOCK_EXPORT_DELETED", {"id": export.identifier})

    server.exports.removed = tell
    monitor.start()
    _LOG.info("monitor on %s", listener)
    try:
        yield
        monitor.emit("SHUTDOWN", {"guest": False, "reason": control.end_reason})
    finally:
        monitor.close()


def _told_of_export(export: Export) -> dict[str, object]:
    return {
        "id": export.identifier,
        "type": "nbd",
        "node-name": export.identifier,
        "shutting-down": export.removed,
        "name": export.name,
        "description": export.offer.description,
        "size": export.offer.size,
        "writable": not export.offer.flags & TransmissionFlags.READ_ONLY,
        "clients": len(export.users),
    }


def _told_of_client(client: Connection) -> dict[str, object]:
    traffic = client.traffic
    return {
        "id": client.number,
        "client": client.peer,
        "export": None if client.export is None else client.export.identifier,
        "tls": client.encrypted,
        "since": int(client.since),
        "requests": sum(traffic.requests),
        "errors": sum(traffic.errors),
        "read-bytes": traffic.bytes[Command.READ],
        "written-bytes": traffic.bytes[Command.WRITE],
    }
