"""An NBD server whose replies the test writes itself: chunk by chunk, true or not.

It shares nothing with ``nbdserve``: numbers and layouts are those of ``tests.support.wire``.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.servers import UnixAddress, fresh_path
from tests.support.wire import (
    CHUNK,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    Kind,
    Option,
    Reply,
)

_EXPORT_FLAGS = 1 | 2 | 1 << 8
"""Flags are sent, the export is read-only, and takes several connections."""
_CONTEXT = 7

Chunks = list[tuple[int, bytes]]
"""The kind and the payload of each chunk of a reply; the last one is marked as that."""
Answer = Callable[[bytes, int, int], Chunks]
"""Makes the reply to a request from the disk, the offset and the length."""


def data(disk: bytes, offset: int, length: int) -> tuple[int, bytes]:
    """A chunk with what is on the disk."""
    return Kind.OFFSET_DATA, struct.pack(">Q", offset) + disk[offset : offset + length]


def hole(offset: int, length: int) -> tuple[int, bytes]:
    """A chunk that says that there are zeros."""
    return Kind.OFFSET_HOLE, struct.pack(">QI", offset, length)


def status(*extents: tuple[int, int], context: int = _CONTEXT) -> tuple[int, bytes]:
    """A chunk with lengths and flags of extents."""
    pairs = b"".join(struct.pack(">II", *extent) for extent in extents)
    return Kind.BLOCK_STATUS, struct.pack(">I", context) + pairs


NOTHING: tuple[int, bytes] = (Kind.NONE, b"")
"""A chunk that only says that the reply is over."""


def whole(disk: bytes, offset: int, length: int) -> Chunks:
    """The true reply to a read."""
    return [data(disk, offset, length)]


def all_data(disk: bytes, offset: int, length: int) -> Chunks:
    """The true reply to a block status request about a disk without holes."""
    return [status((length, 0))]


class Liar:
    """Serves a disk with the replies of these functions; ``answered`` counts them."""

    def __init__(
        self, disk: bytes, read: Answer, about: Answer, simple: Command | None, size: int | None
    ) -> None:
        self.disk = disk
        self._size = len(disk) if size is None else size
        self.answered = 0
        self._read, self._about, self._simple = read, about, simple

    def serve(self, peer: socket.socket) -> None:
        """One client, until it leaves."""
        with peer, suppress(OSError, EOFError):
            if self._haggle(peer):
                self._transmit(peer)

    def _haggle(self, peer: socket.socket) -> bool:
        peer.sendall(GREETING.pack(NBDMAGIC, IHAVEOPT, 3))
        _receive(peer, 4)
        while True:
            _, option, length = OPTION.unpack(_receive(peer, OPTION.size))
            _receive(peer, length)
            match option:
                case Option.STRUCTURED_REPLY:
                    replies = [(Reply.ACK, b"")]
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    context = struct.pack(">I", _CONTEXT) + b"base:allocation"
                    replies = [(Reply.META_CONTEXT, context), (Reply.ACK, b"")]
                case Option.GO:
                    export = struct.pack(">HQH", 0, self._size, _EXPORT_FLAGS)
                    replies = [(Reply.INFO, export), (Reply.ACK, b"")]
                case _:
                    replies = [(Reply.ERR_UNSUP, b"")]
            for kind, payload in replies:
                peer.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload)
            if option == Option.GO:
                return True
            if option == Option.ABORT:
                return False

    def _transmit(self, peer: socket.socket) -> None:
        while True:
            _, _, command, cookie, offset, length = REQUEST.unpack(_receive(peer, REQUEST.size))
            if command == Command.DISC:
                return
            self.answered += 1
            if command == self._simple:
                content = self.disk[offset : offset + length] if command == Command.READ else b""
                peer.sendall(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + content)
                continue
            answer = self._read if command == Command.READ else self._about
            chunks = answer(self.disk, offset, length)
            for number, (kind, payload) in enumerate(chunks, 1):
                done = int(number == len(chunks))
                head = CHUNK.pack(STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload))
                peer.sendall(head + payload)


@contextmanager
def lying(
    disk: bytes,
    directory: Path,
    *,
    read: Answer = whole,
    about: Answer = all_data,
    simple: Command | None = None,
    size: int | None = None,
) -> Iterator[tuple[Liar, UnixAddress]]:
    """A server of a disk until the block ends; requests of the kind ``simple`` get simple replies.

    ``size``, in bytes, is what it says in place of the disk's own.
    """
    liar = Liar(disk, read, about, simple, size)
    path = fresh_path(directory, "liar", ".sock")

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=liar.serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield liar, UnixAddress(path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _receive(peer: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        part = peer.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)
