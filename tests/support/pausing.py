"""An nbdkit that holds its requests, by its pause filter, for as long as the test wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import UnixAddress


@contextmanager
def paused(control: Path) -> Iterator[None]:
    """No request is done until the block ends; those under way are done before it begins.

    ``control`` is the filter's parameter ``pause-control``.
    """
    with UnixAddress(control).connect() as connection:
        connection.sendall(b"p")
        assert connection.recv(1) == b"P"
        yield
        connection.sendall(b"r")
        assert connection.recv(1) == b"R"
