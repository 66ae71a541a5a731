"""What proves that a server has the same disk as before: a few of its blocks, remembered and compared.

Who reconnects is server.py. It shows each new session to failover.py (``_require_same_disk``), which compares
the size first, and then these blocks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from hashlib import blake2b

from nbdserve.client import Client
from nbdserve.client.reconnect import Fault, fault_of
from nbdserve.common.errors import ImageError
from overlay.backing.connections import LOOK
from overlay.backing.reads import Reading, new_pace
from overlay.formats.image import Image, State

_BLOCK = 4096
_MOST = 16
"""Blocks that are remembered."""
_OF_EACH, _APART = 8, 128 << 10
"""Blocks that are taken of what lies together, at most; and bytes from one to the next, at least."""
_ENOUGH = 4
"""Blocks of which none is as it was, after which it is another disk even while the guest runs elsewhere."""
_MOST_RUNS = 1024
"""Runs of an image that are looked at to recall what was copied."""


class Samples:
    """Blocks that servers must have. Safe for several threads.

    While the guest runs at the source it changes its disk: there a block that differs is forgotten, and only
    where nothing is as it was is it another disk. From :meth:`pin` on nothing may differ.
    """

    forgotten: int = 0
    """How often something was forgotten: what a server said before the last time may prove nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: dict[int, bytes] = {}
        self._pinned = False

    @property
    def any_known(self) -> bool:
        """Tell whether there is anything to compare."""
        return bool(self._digests)

    def remember(self, offset: int, data: memoryview, known_at: int | None = None) -> None:
        """Remember what a server said, as far as it is worth it: not zeros, which many disks have there.

        ``known_at`` is what :attr:`forgotten` was when that was still sure to be so; unless it is the same
        now, the disk may have changed since. None: it has not.
        """
        if len(self._digests) >= _MOST:
            return
        for place in _places(len(data)):
            block = bytes(data[place : place + _BLOCK])
            if block.count(0) < len(block):
                with self._lock:
                    if known_at not in (None, self.forgotten):
                        return
                    self._digests[offset + place] = _digest(block)

    def recall(self, image: Image) -> None:
        """Remember what was copied before, as far as the image tells that from what the guest wrote.

        The guest must not write meanwhile.
        """
        if not image.is_written_certain:
            return
        for run in itertools.islice(image.runs(0, image.size if image.local_bytes else 0), _MOST_RUNS):
            if run.state is State.DATA and not run.written:
                for place in _places(run.length):
                    self.remember(run.offset + place, memoryview(image.read(run.offset + place, _BLOCK)))
            if len(self._digests) >= _MOST:
                return

    def forget(self, is_as_it_was: Callable[[int], bool]) -> None:
        """The disk has changed: blocks prove nothing any more but those at offsets for which that is so.

        What is being remembered in this instant is forgotten in any case.
        """
        with self._lock:
            self.forgotten += 1
            known = list(self._digests)
        changed = [offset for offset in known if not is_as_it_was(offset)]
        with self._lock:
            for offset in changed:
                self._digests.pop(offset, None)

    def pin(self) -> None:
        """The disk changes no more. What was said before, while it did, is forgotten."""
        with self._lock:
            self._digests.clear()
            self.forgotten += 1
            self._pinned = True

    def require_same(self, client: Client, name: str, go_on: Callable[[], None]) -> None:
        """Compare; ImageError for another disk, OSError when nothing of it can be read.

        ``go_on`` is called now and then, and raises to end the wait for the server.
        """
        with self._lock:
            wanted, pinned = dict(self._digests), self._pinned
        unreadable, differing = list[OSError](), list[int]()
        for offset, found in _read(client, wanted, go_on):
            if isinstance(found, OSError):
                if not client.connected or fault_of(found) is Fault.SERVER:
                    raise found
                unreadable.append(found)
            elif found != wanted[offset]:
                differing.append(offset)
        if pinned or len(differing) + len(unreadable) == len(wanted) >= _ENOUGH:
            for offset in differing:
                raise ImageError(f"{name}: not used: another disk than before, its bytes at {offset} differ")
        # One place that has gone bad since says nothing of the others.
        if unreadable and len(unreadable) == len(wanted):
            raise unreadable[0]
        with self._lock:
            for offset in differing:
                self._digests.pop(offset, None)


def _places(length: int) -> Iterator[int]:
    """Where in so many bytes blocks are taken."""
    step = max(length // _OF_EACH // _BLOCK * _BLOCK, _APART)
    return itertools.islice(iter(range(0, length - _BLOCK + 1, step)), _OF_EACH)


def _read(
    client: Client, offsets: dict[int, bytes], go_on: Callable[[], None]
) -> Iterator[tuple[int, bytes | OSError]]:
    """The digests of blocks as the server has them now, or why it does not tell; asked for all at once."""
    started, pace = [], new_pace()
    for offset in offsets:
        block = bytearray(_BLOCK)
        started.append((offset, block, Reading(offset, memoryview(block)).start(client, pace)))
    while wait([future for _, _, future in started], LOOK).not_done:
        go_on()
    for offset, block, future in started:
        error = future.exception()
        if error is None:
            yield offset, _digest(bytes(block))
        elif isinstance(error, OSError):
            yield offset, error
        else:
            raise error


def _digest(block: bytes) -> bytes:
    return blake2b(block, digest_size=16).digest()
