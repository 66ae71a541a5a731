"""Sends a guest's changes to its mirror, a batch at a time, for as long as the overlay is served.

One thread, one connection. A batch is cut into chunks that are written where the receiver says that the
next one begins, several at a time; then it is committed, and the mirror has a point. Whatever goes wrong, be
it the connection, the receiver or the reading of the image, the batch is given up, the guest goes on, and the
next one, when the receiver is there again, has all that is dirty (recorder.py).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

from nbdserve.client import Client, connect
from nbdserve.client.dial import Pauses
from nbdserve.client.flight import Window
from nbdserve.client.reconnect import DIAL_TIMEOUT
from nbdserve.common.errors import OperatorError, reason_of
from nbdserve.common.threads import Thread
from nbdserve.common.uri import NbdUri
from nbdserve.protocol.constants import CommandFlags
from overlay.formats.image import Image, State
from overlay.formats.redo.chunks import (
    DATA,
    LONGEST_DATA,
    NO_POINT,
    NOBODY,
    PAGE,
    RECORD,
    Commit,
    Header,
    Point,
    chunk,
    read_told,
    zero_records,
)
from overlay.formats.redo.log import longest_batch
from overlay.mirror.recorder import Batch, Recorder
from overlay.mirror.status import MirrorState, MirrorStatus

_LOG = logging.getLogger("nbd-overlay")

_LONGEST_PAUSE = 5.0
"""Seconds between two attempts to connect."""
_SILENCE = 300.0
"""Seconds in which a receiver must have taken a batch over: it may be long, and its disk slow."""
_LAST = 10.0
"""Seconds in which the last batch must be there when the overlay is not served any more."""
_CHUNK = 1 << 20
_AT_ONCE = 4
"""Chunks that are on their way together."""
_SYNC_EACH = 64 << 20
"""Bytes after which the receiver makes them durable, so that the commit takes no longer than it must."""
_PAUSE = 0.05
"""Seconds between two batches: each costs the guest's processor, however short it is."""
_IDLE = 2.0
"""Seconds after which it is looked whether the receiver is still there."""
_NONE = CommandFlags(0)


class _OtherDiskError(OperatorError):
    """What answers is no mirror of this disk."""


class Mirror:
    """A mirror at an address, of the image whose changes a recorder notes. It owns neither.

    ``tell`` is called, from the thread that sends, with each new state and the reason for it.
    """

    def __init__(self, uri: NbdUri, image: Image, recorder: Recorder) -> None:
        self.tell: Callable[[MirrorState, str], None] = lambda state, reason: None
        self._uri, self._image, self._recorder = uri, image, recorder
        self._state, self._trouble = MirrorState.BEHIND, "not connected yet"
        self._point = NO_POINT
        self._points = self._sent = 0
        self._ending = threading.Event()
        self._client: Client | None = None
        self._thread = Thread(self._run, "mirror")

    def start(self) -> None:
        """Send from now on, as soon as it can be connected to."""
        self._thread.start()

    def close(self) -> None:
        """Send what is left, if that takes no longer than ten seconds, and hang up."""
        self._ending.set()
        self._recorder.stir()
        if not self._thread.is_alive():
            return
        self._thread.join(_LAST)
        client = self._client
        if client is not None:
            client.hang_up()
        self._thread.join(_LAST)
        lacking, _ = self._recorder.lag
        if lacking:
            _LOG.error("the mirror at %s lacks what was written last: up to %d bytes", self._uri, lacking)

    def status(self) -> MirrorStatus:
        """Tell how it is."""
        lag_bytes, lag_seconds = self._recorder.lag
        state, trouble = self._state, self._trouble
        if state is MirrorState.IN_SYNC and self._recorder.is_behind:
            state, trouble = MirrorState.BEHIND, "what it lacks is read again"
        return MirrorStatus(
            str(self._uri),
            state,
            trouble,
            self._point.number,
            self._point.nanoseconds / 1e9,
            self._points,
            lag_bytes,
            lag_seconds,
            self._sent,
        )

    def _run(self) -> None:
        pauses = Pauses(_LONGEST_PAUSE)
        while not self._ending.is_set():
            try:
                self._serve(pauses)
            except _OtherDiskError as error:
                self._become(MirrorState.LOST, str(error))
            except Exception as error:  # noqa: BLE001 - the guest goes on, and the operator is told
                is_expected = isinstance(error, OperatorError | OSError)
                self._become(
                    MirrorState.BEHIND, reason_of(error) if is_expected else f"failed inside: {error!r}"
                )
            if self._ending.wait(pauses.next):
                return
            pauses.grow()

    def _serve(self, pauses: Pauses) -> None:
        """Send over one connection until it ends, or this does."""
        with connect(self._uri, timeout=DIAL_TIMEOUT, silence=_SILENCE, contexts=()) as client:
            self._client = client
            try:
                told = self._ask(client)
                position, number = self._ship(client, told.position, told.point.number)
                self._become(MirrorState.IN_SYNC, "")
                pauses.begin_anew()
                while self._wait(client):
                    self._ending.wait(_PAUSE)
                    position, number = self._ship(client, position, number)
            finally:
                self._client = None

    def _wait(self, client: Client) -> bool:
        """Wait until something is to be sent; False when nothing is any more."""
        while (due := self._recorder.due_in()) != 0:
            if self._ending.is_set():
                return due is not None
            self._recorder.wait(_IDLE if due is None else due)
            if not client.connected:
                raise OSError(errno.ENOTCONN, "the connection is lost")
        return True

    def _ask(self, client: Client) -> Header:
        """Return what the receiver says; OperatorError where it is none, or another disk's."""
        told = read_told(client.read(0, PAGE), str(self._uri))
        if told.size != self._image.size:
            raise _OtherDiskError(
                f"{self._uri}: its disk has {told.size} bytes, this one {self._image.size}: no mirror of it"
            )
        if told.source not in (NOBODY, self._image.uuid):
            raise _OtherDiskError(
                f"{self._uri}: the mirror of another overlay, {told.source}: make a new one for this disk"
            )
        return told

    def _ship(self, client: Client, position: int, number: int) -> tuple[int, int]:
        """Send and commit a batch, which may be empty; returns where the next one begins, and its point."""
        batch = self._recorder.begin()
        try:
            sending = _Sending(client, position, longest_batch(self._image.size))
            notes = self._notes(batch, sending)
            # What comes after this instant is not in it.
            point = Point(number + 1, time.time_ns())
            sending.finish(notes, point)
            client.start_write(0, Commit(self._image.uuid, sending.position).pack(), _NONE).result()
        except BaseException:
            self._recorder.abandoned(batch)
            raise
        self._recorder.committed(batch)
        self._point, self._points, self._sent = point, self._points + 1, self._sent + sending.sent
        return sending.position, point.number

    def _notes(self, batch: Batch, sending: _Sending) -> list[bytearray]:
        """Send what is dirty, round by round; returns the notes that are to be sent behind it."""
        done = 0
        while True:
            for part in batch.rounds[done:]:
                done += 1
                for offset, length in part.ranges():
                    sending.add_all(self._read(offset, length))
            notes = self._recorder.take(batch)
            if notes is not None:
                return notes

    def _read(self, offset: int, length: int) -> Iterator[bytes]:
        """The records of what the guest may have written in a range, as it is in the image now."""
        for begin, count, state in self._recorder.written(offset, length):
            if state is State.ZERO:
                yield zero_records(begin, count)
                continue
            for at in range(begin, begin + count, LONGEST_DATA):
                size = min(LONGEST_DATA, begin + count - at)
                yield RECORD.pack(at, size, DATA) + self._image.read(at, size)

    def _become(self, state: MirrorState, reason: str) -> None:
        if (state, reason) == (self._state, self._trouble):
            return
        self._state, self._trouble = state, reason
        if state is MirrorState.IN_SYNC:
            _LOG.info("the mirror at %s is in sync", self._uri)
        else:
            _LOG.warning("the mirror is %s: %s; the guest goes on", state.value, reason)
        self.tell(state, reason)


class _Sending:
    """The chunks of one batch, on their way over one connection."""

    def __init__(self, client: Client, position: int, most: int) -> None:
        self.position = position
        """Where the next chunk begins."""
        self.sent = 0
        self._client, self._most = client, most
        self._batch: UUID = uuid4()
        self._records: list[bytes | bytearray] = []
        self._length = 0
        self._window = Window(_AT_ONCE)
        self._unsynced = 0

    def add_all(self, records: Iterator[bytes]) -> None:
        """Send these records after those before. OSError, EFBIG, where the batch becomes too long."""
        for record in records:
            self._add(record)

    def finish(self, records: list[bytearray], point: Point) -> None:
        """Send the last records, and wait until everything is there."""
        for record in records:
            self._add(record)
        self._send(point)
        self._window.drain()

    def _add(self, record: bytes | bytearray) -> None:
        if self._records and self._length + len(record) > _CHUNK:
            self._send(None)
        self._records.append(record)
        self._length += len(record)

    def _send(self, point: Point | None) -> None:
        data = chunk(self.position, self._batch, self._records, point)
        self._records, self._length = [], 0
        self.sent += len(data)
        if self.sent > self._most:
            raise OSError(errno.EFBIG, "the guest writes faster than the mirror takes it: it begins anew")
        self._window.make_room()
        self._window.add(self._client.start_write(self.position, data, _NONE), data)
        self.position += len(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_EACH:
            self._unsynced = 0
            self._client.start_flush().result()
