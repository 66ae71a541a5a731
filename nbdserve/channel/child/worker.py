"""The worker that carries the channel, apart from the process that QEMU waits for.

QEMU starts a command (``exec:``) with two pipes: its stream on standard input, the return path on standard
output. When the stream is over QEMU waits for the command to end, and its monitor stands still meanwhile;
and the command must go on serving disks when QEMU has ended. So the command is two processes: the one that
QEMU knows only waits to be told how the RAM has fared, and ends with that; the worker has the pipes, a
session and no parent of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass

from nbdserve.common.errors import OperatorError, UsageError
from nbdserve.common.program import EXIT_DONE, EXIT_FAILED, complain

_PIPE = 1 << 20
"""Bytes that QEMU's pipes may hold, where the kernel allows that."""
_FULL = "no process can be started: look at ulimit -u, systemd's TasksMax and memory"


@dataclass
class Lifeline:
    """What the worker has of the process that QEMU waits for, and QEMU's pipes."""

    reader: int
    writer: int
    announce: int | None

    def over(self, loaded: bool, why: str) -> None:
        """Let the process that QEMU waits for end, once: with 0 if the RAM was loaded, else 1 and a line."""
        if self.announce is not None:
            code = EXIT_DONE if loaded else EXIT_FAILED
            with contextlib.suppress(OSError):
                os.write(self.announce, bytes([code]) + why.encode(errors="replace")[:4000])
            os.close(self.announce)
            self.announce = None


def require_pipes() -> None:
    """UsageError where standard input and output are not what QEMU gives a command."""
    for descriptor in (0, 1):
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind not in (stat.S_IFIFO, stat.S_IFSOCK):
            raise UsageError(
                "standard input and output are to be QEMU's: start this by migrate exec:..., or give --resume"
            )


def split(program: str) -> Lifeline:
    """Go on as the worker. The calling process ends when that has told how the RAM has fared, or has died.

    To be called before any thread is started. OperatorError, in the calling process, when there are no more
    processes.
    """
    _close_inherited()
    answer, announce = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise OperatorError(_FULL) from error
    if child:
        os.close(announce)
        _let_go()
        _, status = os.waitpid(child, 0)
        os._exit(_wait(program, answer) if status == 0 else _fail(program, _FULL))
    os.close(answer)
    os.setsid()
    try:
        grandchild = os.fork()
    except OSError:
        os._exit(EXIT_FAILED)
    if grandchild:
        os._exit(EXIT_DONE)
    reader, writer = os.dup(0), os.dup(1)
    _let_go()
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
    return Lifeline(reader, writer, announce)


def _close_inherited() -> None:
    """Close what QEMU has let through beside its pipes: its tap devices and sockets would outlive it here.

    What was opened by this process is closed by exec(2), and is known by that.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # One of these was the listing's own.
        with contextlib.suppress(OSError):
            if descriptor > 2 and os.get_inheritable(descriptor):
                os.close(descriptor)


def _let_go() -> None:
    """Keep nothing of QEMU's pipes: their end is to be seen when the worker, or QEMU, closes them."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _wait(program: str, answer: int) -> int:
    told = b""
    while piece := os.read(answer, 4096):
        told += piece
    if not told:
        return _fail(program, "the process that carries the channel has died; see its log")
    return told[0] if not told[1:] else _fail(program, told[1:].decode(errors="replace"))


def _fail(program: str, why: str) -> int:
    complain(program, why)
    return EXIT_FAILED
