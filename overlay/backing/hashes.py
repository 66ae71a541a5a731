"""Hashes of the disk's blocks, as a server of it tells them: asked for on a connection of their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from nbdserve.client import Client, connect
from nbdserve.client.reconnect import DIAL_TIMEOUT, Fault, fault_of
from nbdserve.common.errors import OperatorError, reason_of
from nbdserve.protocol.block_hashes import BLOCK, BLOCK_HASHES, told_hashes
from overlay.backing.connections import Session
from overlay.backing.failover import Sources
from overlay.formats.image import Image


class LostError(Exception):
    """The server that is asked for hashes is lost, or makes no sense."""


def connected(session: Session, sources: Sources, pause_point: Callable[[], None]) -> Client | None:
    """Connect to the server of a session for hashes; None where it tells none.

    On the other connections each block status would be one of hashes, too. Raises LostError, also where it
    leads to another disk.
    """
    uri = session.source.uri
    try:
        client = connect(uri, timeout=DIAL_TIMEOUT, contexts=(BLOCK_HASHES,))
    except (OperatorError, OSError) as error:
        raise LostError(reason_of(error)) from error
    try:
        if BLOCK_HASHES not in client.export.contexts:
            client.close()
            return None
        if client.size != session.export.size:
            raise LostError(f"{uri}: another disk")
        sources.samples.require_same(client, str(uri), pause_point)
    except (OperatorError, OSError) as error:
        client.close()
        raise LostError(reason_of(error)) from error
    except BaseException:
        client.close()
        raise
    return client


class Question:
    """The hashes of a range, being asked for."""

    def __init__(self, image: Image, client: Client, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.asked_at = image.invalidations
        self._client = client
        self._future = self._ask(begin)

    def answer(self) -> list[bytes]:
        """Wait for the hashes, of as many blocks as the server can tell of. LostError."""
        found: list[bytes] = []
        while True:
            try:
                status = self._future.result()
            except OSError as error:
                if fault_of(error) is Fault.REQUEST:
                    return found  # it cannot read that: whoever copies it finds out more
                raise LostError(error.strerror) from error
            place = self.begin + len(found) * BLOCK
            more = told_hashes(status, self.end - place)
            found += more
            place += len(more) * BLOCK
            if not more or place >= self.end:
                return found
            self._future = self._ask(place)

    def _ask(self, place: int) -> Future[list[int]]:
        try:
            return self._client.start_status(place, self.end - place, BLOCK_HASHES)
        except OSError as error:
            raise LostError(error.strerror) from error
