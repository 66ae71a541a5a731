"""Whether a host can listen at a TCP port, and another reaches it there: the small program of both ends.

    answer ADDRESS PORT TOKEN SECONDS    listen until somebody sends the token, and send it back
    ask ADDRESS PORT TOKEN SECONDS       send the token, and see that it comes back

The token, any word, tells one check from another; whoever does not send it gets nothing.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress

from nbdserve.common import program
from nbdserve.common.errors import ConnectError

AGAIN = 0.1
"""Seconds between two attempts to connect where nobody listens yet."""

BRIEF = 2.0
"""Seconds for a client to send its token; others wait meanwhile."""


def answer(address: str, port: int, token: str, seconds: float) -> int:
    """Listen for so many seconds. Raises ConnectError where that cannot be done, or nobody has come."""
    deadline = time.monotonic() + seconds
    try:
        listener = _listen(address, port)
    except OSError as error:
        raise ConnectError(
            f"cannot listen at {with_port(address, port)}: {error.strerror or error}"
        ) from error
    with listener:
        while (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                client = listener.accept()[0]
            except TimeoutError:
                break
            except OSError:
                # For want of descriptors, perhaps; who waits is still there then.
                time.sleep(AGAIN)
                continue
            with suppress(OSError), client:
                client.settimeout(min(left, BRIEF))
                if _receive(client, len(token)) == token.encode():
                    client.sendall(token.encode())
                    return program.EXIT_DONE
    raise ConnectError(f"nobody came to {with_port(address, port)} within {seconds:g} s")


def ask(address: str, port: int, token: str, seconds: float) -> int:
    """Connect within so many seconds. Raises ConnectError where nobody, or somebody else, answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(
                (address, port), max(AGAIN, deadline - time.monotonic())
            ) as connection:
                connection.sendall(token.encode())
                if _receive(connection, len(token)) == token.encode():
                    return program.EXIT_DONE
                raise ConnectError(f"somebody else answers at {with_port(address, port)}")
        except TimeoutError as error:
            raise ConnectError(f"no answer from {with_port(address, port)} within {seconds:g} s") from error
        except OSError as error:
            # The other end may be about to begin.
            if not isinstance(error, ConnectionError) or time.monotonic() >= deadline:
                raise ConnectError(f"{with_port(address, port)}: {error.strerror or error}") from error
        time.sleep(AGAIN)


def _listen(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (part := connection.recv(count - len(received))):
        received += part
    return received


def with_port(address: str, port: int) -> str:
    """Return the address as it is written with its port."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def main(end: str, address: str, port: int, token: str, seconds: float) -> int:
    """Be the end ``answer`` or ``ask``."""
    return (answer if end == "answer" else ask)(address, port, token, seconds)


if __name__ == "__main__":
    end, address, port, token, seconds = sys.argv[1:]
    sys.exit(program.run("nbd-migrate", lambda: main(end, address, int(port), token, float(seconds))))
