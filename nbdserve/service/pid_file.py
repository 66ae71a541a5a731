"""Pid files, each of which belongs to one living process.

A process keeps its file locked, as QEMU does, so that two can tell who is alive without trusting a number
that another process may have by now. The file appears whole, and what stands at the path is never followed
or overwritten unless it is the pid file of a process that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from nbdserve.common import file_locks
from nbdserve.common.errors import OperatorError
from nbdserve.common.threads import LOOK

_CONTENT = re.compile(rb"\s*([0-9]*)\s*")
_MOST = 32
"""Bytes that a pid file has at most."""
_PATIENCE = 1.0
"""Seconds in which another newcomer has taken the place of a process that has ended."""


class PidFile:
    """The pid file of this process, for the duration of a ``with`` block; nothing where there is no path.

    It appears with ``publish``, and goes at the end of the block unless somebody else's is there by then. An
    ``OperatorError`` tells, when the block begins already, that another process holds it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._held: int | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            with _explained(self._path), contextlib.suppress(FileNotFoundError):
                os.close(_open_abandoned(self._path))
        return self

    def publish(self) -> None:
        """Let the file appear, with this process's id in it; OperatorError when that is not possible."""
        if self._path is None:
            return
        with _explained(self._path):
            directory = self._path.absolute().parent
            fresh = directory / f".{self._path.name}.{os.urandom(8).hex()}"
            held = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.write(held, f"{os.getpid()}\n".encode())
                with contextlib.suppress(OSError):
                    file_locks.lock(held, file_locks.WRITE)
                _put_in_place(fresh, self._path)
            except BaseException:
                os.close(held)
                raise
            finally:
                fresh.unlink(missing_ok=True)
            self._held = held

    def __exit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if self._path is None or held is None:
            return
        try:
            if _is_at(self._path, held):
                self._path.unlink()
        except OSError:
            # Where privileges were dropped the directory is out of reach. Nobody shall signal a stranger.
            os.ftruncate(held, 0)
        finally:
            os.close(held)


def _put_in_place(fresh: Path, path: Path) -> None:
    """Give a file another name, where there is none of a living process."""
    while True:
        try:
            os.link(fresh, path)
            return
        except FileExistsError:
            remove_abandoned(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(path):
                raise
            # A file system without hard links.
            fresh.rename(path)
            return


def remove_abandoned(path: Path) -> None:
    """Remove the pid file of a process that has ended; OperatorError, or OSError, when it is not that."""
    try:
        abandoned = _open_abandoned(path)
    except FileNotFoundError:
        return
    try:
        # Who locks it may remove it: nobody else does.
        if _is_at(path, abandoned):
            path.unlink()
    finally:
        os.close(abandoned)


def _open_abandoned(path: Path) -> int:
    """Open and lock the pid file of a process that has ended.

    Raises FileNotFoundError when there is no file, OperatorError when it is no such file, other OSErrors.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = _open(path)
        try:
            owner = _owner(path, descriptor)
            if _take(descriptor, owner):
                return descriptor
            if _is_alive(owner) or time.monotonic() > deadline:
                who = f"process {owner}" if owner else "another process"
                raise OperatorError(f"{path}: {who} has this pid file: end it first, or choose another path")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(LOOK)


def _take(descriptor: int, owner: int) -> bool:
    """Lock the file; False when its owner lives and has locked it."""
    try:
        file_locks.lock(descriptor, file_locks.WRITE)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks: the number is all that is known.
        return not _is_alive(owner)
    return True


def _open(path: Path) -> int:
    # Non-blocking, so that a FIFO is refused and not waited for.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_pid_file(path) from error
        raise


def _owner(path: Path, descriptor: int) -> int:
    """The process that the file names; 0 when it is empty."""
    status = os.fstat(descriptor)
    whole = stat.S_ISREG(status.st_mode) and status.st_size <= _MOST
    told = _CONTENT.fullmatch(os.pread(descriptor, _MOST, 0)) if whole else None
    if told is None:
        raise _no_pid_file(path)
    return int(told[1] or 0)


def _no_pid_file(path: Path) -> OperatorError:
    return OperatorError(f"{path}: what is there is no pid file, and is left alone: choose another path")


def _is_alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path leads to this open file, and not through a symbolic link."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError into one line about the pid file."""
    try:
        yield
    except OSError as error:
        raise OperatorError(f"{path}: cannot write the pid file: {error.strerror}") from error
