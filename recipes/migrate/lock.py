"""The lock of a migration: who has it acts on it, and nobody else. It lies beside the journal.

It is free when every process that has the same open file has ended, so that an orchestrator and its guard
hold it together.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from recipes.errors import MigrationError

NAME = "lock"
"""Of the file, in which its holder's process id is."""

MOMENT = 0.2
"""Seconds for which a lock that somebody else has is asked for again."""

UNKNOWN_PROCESS = -1
"""The id of a process that has not signed."""


class JournalBusyError(MigrationError):
    """Another process acts on this migration; ``pid`` is its id, 0 if it has not said so yet."""

    def __init__(self, message: str, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


@dataclass
class Lock:
    """The right to act on a migration, for as long as any process has the file open."""

    fd: int

    @classmethod
    def taken(cls, directory: Path) -> Self:
        """Take it. Raises JournalBusyError when another process has it, MigrationError when that fails."""
        try:
            fd = os.open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MigrationError(
                f"{directory / NAME}: {error.strerror}; where that cannot be mended and the guest is on B, "
                "nbd-migrate finish PLAN.toml with XDG_STATE_HOME set to another directory goes on"
            ) from error
        deadline = time.monotonic() + MOMENT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # Who only looks holds it for an instant.
                if time.monotonic() < deadline:
                    time.sleep(MOMENT / 20)
                    continue
                pid = _signed(fd)
                os.close(fd)
                raise JournalBusyError(
                    f"{directory.name}: process {pid or 'unknown'} is at work on this migration already", pid
                ) from error
            except OSError as error:
                os.close(fd)
                raise MigrationError(f"{directory / NAME}: it cannot be locked: {error.strerror}") from error
        if not os.fstat(fd).st_nlink:
            # Whoever had it has removed it meanwhile, with all that it was for.
            os.close(fd)
            raise JournalBusyError(f"{directory.name}: another process has just removed this migration", 0)
        return cls(fd)

    def sign(self) -> None:
        """Write down which process acts, where that can be written."""
        with suppress(OSError):
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the lock is free when everybody has."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(directory: Path) -> int:
    """Return the process that holds the lock: its id, or 0 if nobody does. Needs no right to write there."""
    path = directory / NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _signed(fd) or UNKNOWN_PROCESS
    except OSError as error:
        raise MigrationError(f"{path}: it cannot be locked: {error.strerror}") from error
    finally:
        os.close(fd)
    return 0


def _signed(fd: int) -> int:
    said = os.pread(fd, 32, 0).split()
    return int(said[0]) if said and said[0].isdigit() else 0
