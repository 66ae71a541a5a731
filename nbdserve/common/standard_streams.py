"""A command's standard streams: there even if it was started without, and never the cause of a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

OUTPUT = "standard output"
"""The file name in the OSError of a write to it that fails."""


class _Output(io.FileIO):
    """Standard output, whose errors tell that they are its own."""

    def write(self, data: Any, /) -> int:
        """Write bytes; OSError with OUTPUT for a file name."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            raise


def prepare() -> None:
    """Open what is closed (``>&-``) on the null device, and give errors of standard output its name.

    Do so first of all: otherwise the next file or socket that is opened gets the number of a stream that is
    closed, and what is meant for the operator goes there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # It gets this number, as the lowest one that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python itself has none then.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - as long as this process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None or (sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper)):
        sys.stdout = _named(sys.stdout or open(1, "w", closefd=False))  # noqa: SIM115


def _named(stream: io.TextIOWrapper) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(1, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def silence(stream: TextIO) -> None:
    """From now on nobody gets what is written to this stream, nor what it still holds."""
    null = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(OSError):
        os.dup2(null, stream.fileno())
    os.close(null)
    with contextlib.suppress(OSError):
        stream.flush()


def trouble_of(stream: TextIO) -> OSError | None:
    """Tell why what was written to this stream cannot get out, if so; then it is silenced."""
    try:
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None
