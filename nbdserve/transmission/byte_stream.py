"""The byte stream to one client: a socket, or TLS over a socket."""

from __future__ import annotations

from typing import Protocol


class Stream(Protocol):
    """What the connection needs of a stream. A socket fits.

    Errors and time-outs are those of the socket: OSError, of which TimeoutError and BlockingIOError say that
    time has run out.
    """

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """Receive into the buffer; 0 at the end of the stream. MSG_WAITALL in ``flags`` is only a hint."""

    def sendall(self, data: bytes | bytearray | memoryview, /) -> None:
        """Send everything."""
