"""Whether what was copied is what the source has, by hashes of blocks, before it is cut loose from that.

A block in which the guest has written is left out and counted: the image records who wrote what, and a
guest's write changes data and record as one, under the image's lock. So a block is compared as follows: if
nothing in it was written it is read and hashed; if that is not the source's hash, and nothing in it has been
written since, the two differ. What nbd-overlay was doing for a guest when it was killed may be stored and not
recorded: the guest's QEMU asks for it again, for which differences are given time.

Unlike inspect/verify.py, which reads the whole source, and an image that nobody uses.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

from nbdserve.client import Client
from nbdserve.client.reconnect import Fault, fault_of
from nbdserve.protocol.block_hashes import BLOCK, block_hash
from overlay.backing.connections import Session
from overlay.backing.failover import Sources
from overlay.backing.hashes import LostError, Question, connected
from overlay.formats.image import Image

_LOG = logging.getLogger("nbd-overlay")

_AHEAD = 4
"""Requests for hashes under way at once."""
_LONGEST = 1 << 20
"""Bytes of the disk whose hashes are asked for at once."""
_PAUSE = 1.0
"""Seconds before a connection that was lost is made again, and between two looks at differences."""
_PATIENCE = 15.0
"""Seconds in which a guest's QEMU has asked again for what was under way when nbd-overlay was killed."""


class DifferenceError(OSError):
    """Something that was copied is not what the source has."""


class Verifying:
    """Compares the whole disk, once nothing is absent. For the streamer's thread.

    compared  bytes that are equal
    written   bytes that were left out, as the guest has written in their blocks
    differing the places of blocks that are different
    """

    def __init__(self, image: Image, sources: Sources) -> None:
        self.wanted = False
        self.is_over = False
        self.compared = self.written = 0
        self.differing: list[int] = []
        self._image, self._sources = image, sources
        self._begin = self._end = 0.0

    @property
    def looked_at(self) -> int:
        """Return how many bytes have been looked at."""
        return self.compared + self.written

    @property
    def seconds(self) -> float:
        """Return how long it took, or has taken until now."""
        return (self._end or time.monotonic()) - self._begin if self._begin else 0.0

    def run(self, session: Callable[[], Session], pause_point: Callable[[float], None]) -> None:
        """Compare everything. Raises DifferenceError, OSError, and what ``pause_point`` does."""
        self.is_over, self.compared, self.written, self.differing = False, 0, 0, []
        self._begin, self._end = time.monotonic(), 0.0
        come, deadline, lost_since = 0, 0.0, 0.0
        while come < self._image.size or self.differing:
            if self.differing and come == self._image.size:
                # All has been looked at.
                deadline = deadline or time.monotonic() + _PATIENCE
                if not self._image.was_killed or time.monotonic() > deadline:
                    raise self._difference()
                pause_point(_PAUSE)
            try:
                client = connected(session(), self._sources, lambda: pause_point(0.0))
                if client is None:
                    why = "the source tells no block hashes (nbdserve --block-hashes does)"
                    raise OSError(errno.EOPNOTSUPP, f"the copy cannot be verified: {why}")
                with client:
                    for each in self._look_at(client, come):
                        come, lost_since = each, 0.0
                        pause_point(0.0)
                    self._look_again(client)
            except LostError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > self._sources.patience:
                    raise OSError(errno.EIO, f"the copy cannot be verified: {error}") from error
                pause_point(_PAUSE)
        self._end = time.monotonic()
        self.is_over = True
        _LOG.info("%d bytes are as the source has them, %d are the guest's", self.compared, self.written)

    def _look_at(self, client: Client, come: int) -> Iterator[int]:
        """Compare from a place on; yield where each piece ends."""
        size = min(self._image.size, client.size)
        place, limit = come, size // BLOCK * BLOCK
        asked: deque[Question] = deque()
        while place < limit or asked:
            while place < limit and len(asked) < _AHEAD:
                end = min(place - place % _LONGEST + _LONGEST, limit)
                asked.append(Question(self._image, client, place, end))
                place = end
            question = asked.popleft()
            for number, told in enumerate(self._answered(question)):
                self._judge(question.begin + number * BLOCK, BLOCK, told)
            yield question.end
        if come < self._image.size:
            if come < size and limit < size:
                # What is no whole block has no hash.
                self._judge(limit, size - limit, block_hash(_read(client, limit, size - limit)))
            yield self._image.size

    def _look_again(self, client: Client) -> None:
        """Compare what was different once more; what that does not come to, as it is cut short, stays so."""
        size, places, self.differing = min(self._image.size, client.size), deque(self.differing), []
        try:
            while places:
                place = places[0]
                length = min(BLOCK, size - place)
                if length < BLOCK:
                    told = block_hash(_read(client, place, length))
                else:
                    [told] = self._answered(Question(self._image, client, place, place + BLOCK))
                self._judge(place, length, told)
                places.popleft()
        finally:
            self.differing += places

    def _answered(self, question: Question) -> list[bytes]:
        """Return the hashes of all blocks of a question; OSError where the source cannot tell one."""
        hashes = question.answer()
        place = question.begin + len(hashes) * BLOCK
        if place < question.end:
            raise OSError(errno.EIO, f"the backing at {place} cannot be read, so the copy is not verified")
        return hashes

    def _judge(self, place: int, length: int, told: bytes) -> None:
        """Compare a block with the hash that the source has told of it."""
        if self._has_written(place, length):
            self.written += length
        elif block_hash(self._image.read(place, length)) == told:
            self.compared += length
        elif self._has_written(place, length):
            # In the meantime.
            self.written += length
        else:
            self.differing.append(place)

    def _has_written(self, place: int, length: int) -> bool:
        return any(run.written for run in self._image.runs(place, length))

    def _difference(self) -> DifferenceError:
        count, first = len(self.differing), self.differing[0]
        blocks = "1 block" if count == 1 else f"{count} blocks"
        what = f"{blocks} of {BLOCK} bytes on this host and at the source differ, the first at {first}"
        if not self._image.is_written_certain:
            what += "; as the power has failed here, the guest may have written that"
        elif self._image.was_killed:
            what += (
                "; nbd-overlay was killed before, and a write that was under way then and never came again "
                "is such a difference, too"
            )
        return DifferenceError(errno.EIO, what)


def _read(client: Client, place: int, length: int) -> bytes:
    """Return a part of the disk; LostError where the server is lost."""
    try:
        return client.read(place, length)
    except OSError as error:
        if fault_of(error) is Fault.REQUEST:
            raise OSError(error.errno, f"the backing at {place} cannot be read: {error.strerror}") from error
        raise LostError(error.strerror) from error
