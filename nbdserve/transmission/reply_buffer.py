"""Replies on their way to one client: gathered in one buffer, sent with one system call."""

from __future__ import annotations

import logging
import mmap
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from nbdserve.backends.splicing import FileRange, Pipe, open_pipe
from nbdserve.common.errors import ConnectionLostError
from nbdserve.transmission.byte_stream import Stream

_LOG = logging.getLogger("nbdserve")
CAPACITY = 512 << 10
"""The size of the buffer in bytes. Larger ones fall out of the processor's cache and are slower."""

Data = bytes | bytearray | memoryview


class Replies(ABC):
    """A buffer of replies, which belongs to one thread.

    ``used`` bytes of ``view``, and of ``buffer``, which is the same, are filled; whoever fills more calls
    ``reserve`` first, for at most ``capacity`` bytes at a time, and looks at ``view`` again.
    """

    def __init__(self, buffer: bytearray | mmap.mmap, capacity: int) -> None:
        self.capacity = capacity
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.used = 0

    @abstractmethod
    def reserve(self, length: int) -> int:
        """Make room for ``length`` bytes and return where they start."""

    def add(self, data: Data) -> None:
        """Append bytes of any length."""
        length = len(data)
        start = self.reserve(length)
        self.buffer[start : start + length] = data
        self.used = start + length

    def most_to_splice(self, source: FileRange) -> int:
        """Tell how many bytes of a file ``splice`` can take with one reply; 0 where it cannot take any."""
        return 0

    def splice(self, head: bytearray, source: FileRange, length: int) -> bool:
        """Send the head of a reply and its data, which goes from the file to the socket without being copied.

        Raises OSError when the file cannot be read; nothing has been sent then. False, with nothing sent
        either, where the file system cannot do it; it is not tried again.
        """
        return False


class Parcel(Replies):
    """The whole reply to one request, put together aside; it grows as it must."""

    def __init__(self, size: int) -> None:
        super().__init__(bytearray(size), sys.maxsize)

    def reserve(self, length: int) -> int:
        """Make room for ``length`` bytes and return where they start."""
        needed = self.used + length
        if needed > len(self.buffer):
            grown = bytearray(max(needed, 2 * len(self.buffer)))
            grown[: self.used] = self.view[: self.used]
            self.buffer, self.view = grown, memoryview(grown)
        return self.used

    def content(self) -> memoryview:
        """Return all of it."""
        return self.view[: self.used]


class ReplyBuffer(Replies):
    """The way to the client. The transmission loop builds the replies to reads in ``view`` itself.

    Everything but ``post`` belongs to one thread. Raises ConnectionLostError when the client is gone, or
    takes nothing for the socket's send time-out; nothing is sent any more then, by whichever way, as a reply
    may have been sent by half. ``log_writes`` is called before what has been gathered is sent; when it raises
    OSError the client is lost, as it must not be told. ``lost`` is called with the reason, once, by the
    thread that finds out: another one may be waiting for the client's next request.
    """

    def __init__(
        self,
        stream: Stream,
        log_writes: Callable[[], None] = lambda: None,
        lost: Callable[[str], object] = lambda _: None,
    ) -> None:
        # Memory that costs nothing until it is used: of many clients most are idle.
        super().__init__(mmap.mmap(-1, CAPACITY), CAPACITY)
        self._stream = stream
        self._log_writes = log_writes
        self._tell_lost = lost
        self._lock = threading.Lock()
        self._posted: deque[tuple[memoryview, Callable[[], None]]] = deque()
        # Why nothing is sent any more. Not the error itself, whose traceback would keep this alive.
        self._lost: str | None = None
        # Only a plain socket takes pages as they are.
        self._socket = stream if isinstance(stream, socket.socket) else None
        self._pipe: Pipe | None = None

    def reserve(self, length: int) -> int:
        """Make room for ``length`` bytes, at most the capacity, and return where they start."""
        if self.used + length > self.capacity:
            self.flush()
        return self.used

    def add(self, data: Data) -> None:
        """Append bytes of any length."""
        if len(data) > self.capacity:
            self.flush()
            self._send(data)
        else:
            super().add(data)

    def flush(self) -> None:
        """Send everything."""
        if self.used:
            try:
                self._log_writes()
            except OSError as error:
                raise self._lose(f"what was written cannot be kept: {error.strerror or error}") from error
            self._send(self.view[: self.used])
            self.used = 0

    def post(self, reply: memoryview, over: Callable[[], None]) -> None:
        """Send a whole reply, and call ``over``, once, when it is sent or the client lost. From any thread.

        Where another thread is sending already, and may have to wait for a client that takes nothing, the
        reply is left to that thread, whatever becomes of what it sends itself.
        """
        self._posted.append((reply, over))
        self._send_posted()

    @property
    def lost(self) -> bool:
        """Tell whether nothing is sent any more. From any thread."""
        return self._lost is not None

    def require(self) -> None:
        """Raise ConnectionLostError when nothing is sent any more."""
        if self._lost is not None:
            raise ConnectionLostError(self._lost)

    def most_to_splice(self, source: FileRange) -> int:
        """Tell how many bytes of a file ``splice`` can take with one reply; 0 where it cannot take any."""
        if self._socket is None:
            return 0
        if self._pipe is None:
            self._pipe = open_pipe()
        return self._pipe.most(source.offset) if self._pipe else 0

    def splice(self, head: bytearray, source: FileRange, length: int) -> bool:
        """Send the head of a reply and its data, which goes from the file to the socket without being copied.

        Raises OSError when the file cannot be read; nothing has been sent then. False, with nothing sent
        either, where the file system cannot do it; it is not tried again.
        """
        if self._socket is None or self._pipe is None:
            return False
        if not self._pipe.fill(source, length):
            self._socket = None
            return False
        self.flush()
        self._send(head, length)
        return True

    def close(self) -> None:
        """Let go of the pipe, if there is one."""
        if self._pipe is not None:
            self._pipe.close()

    def _send(self, data: Data, spliced: int = 0) -> None:
        """Send them, and bytes of the pipe; then, also when that fails, what others have left here."""
        try:
            with self._lock:
                self._put(data, spliced)
        finally:
            if self._posted:
                self._send_posted()

    def _send_posted(self) -> None:
        """Send what is posted, unless somebody else does; once the client is lost it is over unsent.

        Whoever holds the lock looks for more after it has let go of it, so nothing stays behind.
        """
        while self._posted and self._lock.acquire(blocking=False):
            try:
                if not self._posted:
                    # Somebody else was faster.
                    continue
                reply, over = self._posted.popleft()
                try:
                    self._put(reply)
                except ConnectionLostError as error:
                    # The connection's own thread notices too, and ends the connection.
                    _LOG.debug("%s", error)
                finally:
                    over()
            finally:
                self._lock.release()

    def _put(self, data: Data, spliced: int = 0) -> None:
        """The one place where anything is sent, with the lock held."""
        # A reply may have been sent by half: nothing that follows would be understood.
        self.require()
        try:
            if spliced:
                assert self._socket is not None
                assert self._pipe is not None
                self._socket.sendall(data, socket.MSG_MORE)
                self._pipe.empty(self._socket.fileno(), spliced)
            else:
                self._stream.sendall(data)
        except OSError as error:
            raise self._lose(f"the client takes no replies: {error.strerror or error}") from error
        except MemoryError as error:
            raise self._lose("there is no memory left to send replies with") from error

    def _lose(self, why: str) -> ConnectionLostError:
        """From now on nothing is sent any more."""
        if self._lost is None:
            self._lost = why
            self._tell_lost(why)
        return ConnectionLostError(self._lost)
