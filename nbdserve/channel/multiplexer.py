"""One connection of a channel at work: one thread that moves bytes between the transport and the local ends.

It never waits for any of them: epoll tells it, edge-triggered, who can be read or written again. What is to
be sent is read from the local ends only when the transport takes it, so that whatever is more urgent by then
goes first.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from nbdserve.channel.local_ends import LocalEnd
from nbdserve.channel.transports import Transport
from nbdserve.channel.wire.frames import (
    HEADER,
    MOST_DATA,
    Bye,
    Close,
    CloseReason,
    Control,
    Data,
    Done,
    End,
    Frame,
    Open,
    Ram,
    Reset,
    ResetReason,
)
from nbdserve.channel.wire.session import Session
from nbdserve.channel.wire.streams import Stream
from nbdserve.common.errors import ConnectionLostError, ProtocolError, reason_of

_LEAST_BATCH, _MOST_BATCH = 2 * (HEADER.size + MOST_DATA), 8 * (HEADER.size + MOST_DATA)
"""Bytes that are handed to the transport at a time: what is urgent waits for these at most. Many only as long
as the transport takes them all at once, so on a fast one."""
_GULP = 512 << 10
"""Bytes that are received at a time."""
_PIECES = 512
"""Pieces that are delivered with one system call, of the 1024 that it takes."""
_LEAVE = 2.0
"""Seconds that the other end has to take the last words."""
_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

T = TypeVar("T")


class Handler(Protocol):
    """Who uses a connection. All of it is called in the multiplexer's thread, and must return at once."""

    def opened(self, stream: Stream) -> LocalEnd:
        """Return the local end of a stream that the other end has opened; OSError refuses it."""

    def told(self, frame: Ram | Done | Bye | Close) -> None:
        """The other end says so."""

    def over(self, stream: Stream, why: str | None) -> None:
        """A stream is at its end: a good one, or by a reset for a reason."""


class Multiplexer:
    """A proven connection. ``run`` works in the calling thread; what others may call says so."""

    def __init__(self, transport: Transport, session: Session, handler: Handler) -> None:
        self.transport = transport
        self.session = session
        self.sent = 0
        self.received = 0
        """Bytes, of frames."""
        self._handler = handler
        self._ends: dict[int, LocalEnd] = {}
        self._by_fd: dict[int, LocalEnd] = {}
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._readable = self._writable = True
        self._buffer = memoryview(bytearray(_MOST_BATCH))
        self._batch = self._buffer[:0]
        self._most = _LEAST_BATCH
        """Bytes of the next batch, at most."""
        self._gulp = memoryview(bytearray(_GULP))
        self._looked = time.monotonic()
        self._ended: list[LocalEnd] = []
        """Those that came to their end while they were read, until it is looked whether they are over."""
        self._leave_by: float | None = None
        self._finished = False
        self._why = f"{transport.name}: the connection has ended"
        self._lock = threading.Lock()
        """Held for moments only: whether questions are taken, and the bell, which is gone with that."""
        self._questions: deque[Callable[[bool], None]] | None = deque()

    @property
    def held(self) -> int:
        """Tell how many bytes have come and are not delivered. From any thread."""
        return sum(end.held for end in list(self._ends.values()))

    def attach(self, end: LocalEnd) -> None:
        """Use the local end of a stream. OSError, with the end closed, when that cannot be done."""
        try:
            for fd in {end.reader, end.writer}:
                self._epoll.register(
                    fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
                )
        except OSError:
            end.close()
            raise
        self._ends[end.stream.number] = end
        self._by_fd[end.reader] = self._by_fd[end.writer] = end

    def let_in(self, end: LocalEnd) -> None:
        """Deliver to an end that was kept waiting."""
        end.is_kept_waiting = False
        if not end.closed:
            self._deliver(end, [])

    def leave(self, frame: Control, limit: float = _LEAVE) -> None:
        """Say this last, and end when the other end has taken it, or in so many seconds."""
        if self._leave_by is None:
            self.session.say(frame)
            self._leave_by = time.monotonic() + limit

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Let the thread of ``run`` do something; from any thread. ConnectionLostError where it has ended."""
        promise: Future[T] = Future()

        def answer(alive: bool) -> None:
            try:
                if not alive:
                    raise self._has_ended()
                promise.set_result(work())
            except Exception as error:  # noqa: BLE001 - it is raised again where it is waited for
                promise.set_exception(error)

        with self._lock:
            if self._questions is None:
                raise self._has_ended()
            self._questions.append(answer)
            os.eventfd_write(self._bell, 1)
        return promise

    def _has_ended(self) -> ConnectionLostError:
        return ConnectionLostError(f"{self.transport.name}: the connection has ended")

    def run(self) -> bool:
        """Work until this end has left; tell whether the other end has hung up behind its last words.

        Raises ConnectionLostError when the connection is lost, ProtocolError when the other end does not
        keep to the specification, which it is told. In any case everything is closed.
        """
        try:
            self._epoll.register(self._bell, select.EPOLLIN)
            self._epoll.register(
                self.transport.fileno(),
                select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET,
            )
            return self._work()
        except ProtocolError as error:
            self._why = str(error)
            self._say_farewell(Close(CloseReason.PROTOCOL, self._why))
            raise
        except (OSError, ConnectionLostError) as error:
            self._why = f"{self.transport.name}: {reason_of(error)}"
            raise ConnectionLostError(self._why) from error
        finally:
            self.close()

    def _work(self) -> bool:
        while True:
            idle = not (self._readable or (self._writable and (self._batch or self.session.has_to_send)))
            for fd, events in self._epoll.poll(self.session.interval if idle else 0):
                self._happened(fd, events)
            if self._readable and not self._receive():
                if self._leave_by is None:
                    raise ConnectionLostError("hung up")
                return True
            if self._writable:
                self._send()
            now = time.monotonic()
            if now - self._looked >= self.session.interval / 2:
                self.session.look(now - self._looked)
                self._looked = now
            if self._leave_by is not None:
                if now >= self._leave_by:
                    return False
                self._finish()
            elif self.session.is_dead:
                raise ConnectionLostError(f"nothing was heard for {self.session.silent:.0f} s")

    def _finish(self) -> None:
        """Close our half behind the last words: to close all of it might destroy them on the way."""
        if not (self._finished or self._batch or self.session.has_to_send) and self.transport.flush():
            self._finished = True
            self.transport.finish()

    def _happened(self, fd: int, events: int) -> None:
        if fd == self._bell:
            os.eventfd_read(self._bell)
            while self._questions:
                self._questions.popleft()(True)
            return
        if fd == self.transport.fileno():
            self._readable = self._readable or bool(events & _READ)
            self._writable = self._writable or bool(events & _WRITE)
            return
        end = self._by_fd.get(fd)
        if end is None:
            # It was closed after the kernel told of it.
            return
        if fd == end.reader and events & _READ:
            self.session.begin(end.stream)
            if events & select.EPOLLHUP:
                end.on_hang_up()
        if fd == end.writer and events & _WRITE:
            self._deliver(end, [])

    # Out.

    def _send(self) -> None:
        if not self.transport.flush():
            self._writable = False
            return
        if not self._batch:
            self._batch = self._buffer[: self.session.fill(self._buffer[: self._most], self._read)]
            while self._ended:
                self._close_if_over(self._ended.pop())
        if self._batch:
            was_full = len(self._batch) + MOST_DATA >= self._most
            count = self.transport.send(self._batch)
            self.sent += count
            self._batch = self._batch[count:]
            self._writable = not self._batch and self.transport.flush()
            if not self._writable:
                self._most = max(self._most // 2, _LEAST_BATCH)
            elif was_full:
                self._most = min(self._most * 2, _MOST_BATCH)

    def _read(self, stream: Stream, buffers: list[memoryview]) -> int | None:
        end = self._ends.get(stream.number)
        if end is None:
            return None
        try:
            count = end.read_into(buffers)
            if count == 0:
                self._ended.append(end)
            return count
        except OSError as error:
            self._break(end, error)
            return None

    # In.

    def _receive(self) -> bool:
        """Take what has arrived; False at the end."""
        count = self.transport.receive_into(self._gulp)
        if not count:
            self._readable = False
            return count is None
        self.received += count
        # Pieces that follow each other on a stream are delivered with one system call.
        pieces = list[memoryview]()
        last = 0
        for stream, frame in self.session.receive(self._gulp[:count]):
            if isinstance(frame, Data) and frame.stream == last and len(pieces) < _PIECES:
                pieces.append(frame.piece)
                continue
            self._pass_on(last, pieces)
            pieces, last = [], 0
            if isinstance(frame, Data):
                pieces, last = [frame.piece], frame.stream
            else:
                self._take(stream, frame)
        self._pass_on(last, pieces)
        return True

    def _pass_on(self, number: int, pieces: list[memoryview]) -> None:
        if pieces and (end := self._ends.get(number)) is not None:
            self._deliver(end, pieces)

    def _take(self, stream: Stream | None, frame: Frame) -> None:
        match frame:
            case Open() if stream is not None:
                self._open(stream)
            case End(number):
                if (end := self._ends.get(number)) is not None:
                    self._end(end)
            case Reset(number, reason, text):
                if (end := self._ends.get(number)) is not None:
                    self._drop(end, text or reason.name.lower())
            case Ram() | Done() | Bye() | Close():
                self._handler.told(frame)
            case _:
                pass

    def _open(self, stream: Stream) -> None:
        try:
            end = self._handler.opened(stream)
        except OSError as error:
            self._refuse(stream, error)
            return
        try:
            self.attach(end)
        except OSError as error:
            self._refuse(stream, error)
            self._handler.over(stream, reason_of(error))

    def _refuse(self, stream: Stream, error: OSError) -> None:
        self.session.give_up(stream, ResetReason.REFUSED, reason_of(error))
        self.session.release(stream)

    def _deliver(self, end: LocalEnd, pieces: list[memoryview]) -> None:
        """Deliver what has come, or what has waited."""
        try:
            count = end.deliver(pieces) if pieces else end.flush()
        except OSError as error:
            self._break(end, error)
            return
        if count:
            self.session.took(end.stream, count)
        self._close_if_over(end)

    def _end(self, end: LocalEnd) -> None:
        try:
            end.end()
        except OSError as error:
            self._break(end, error)
        self._close_if_over(end)

    # The end of streams.

    def _close_if_over(self, end: LocalEnd) -> None:
        if end.stream.over and not end.held and not end.closed:
            self._drop(end, None)

    def _break(self, end: LocalEnd, error: OSError) -> None:
        """What is behind a stream failed."""
        self.session.give_up(end.stream, ResetReason.BROKEN, reason_of(error))
        self._drop(end, reason_of(error))

    def _drop(self, end: LocalEnd, why: str | None) -> None:
        if self._ends.pop(end.stream.number, None) is None:
            return
        for fd in [fd for fd, each in self._by_fd.items() if each is end]:
            del self._by_fd[fd]
        end.close()
        self.session.release(end.stream)
        self._handler.over(end.stream, why)

    # The end of the connection.

    def _say_farewell(self, frame: Close) -> None:
        """Tell the other end why, if that can be done now."""
        self.session.say(frame)
        with contextlib.suppress(OSError):
            for _ in range(2):
                self._send()
            self.transport.finish()

    def close(self) -> None:
        """Close everything. Not beside ``run``, which does so itself."""
        with self._lock:
            questions, self._questions = self._questions or deque(), None
            os.close(self._bell)
        for end in list(self._ends.values()):
            self._drop(end, self._why)
        # Who asked in the last moment learns that there is nobody to answer.
        for answer in questions:
            answer(False)
        self._epoll.close()
        self.transport.close()
