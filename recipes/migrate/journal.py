"""The journal: each state of a migration on a line, appended and synced before the action that it announces.

A line holds the whole State (state.py): the plan, the phase, the disks, the processes with their ids, what
was made on B, when the guest arrived. The phases follow each other as they stand in ``Phase``; each is
written by ``Migration.enter`` (runtime.py) before its first action. A process is written down just after its
start: until then it ends with whoever has started it (processes/supervisor.py). A new entry, or a new field,
is a matter of tests/vm/test_migrate_journal.py (ENTRIES, ARRIVAL, the list of phases),
tests/unit/recipes/migrate/test_journal.py (FULL) and test_decide.py.

One is not waited for: that the switch-over begins, as the guest stands still then (steps/cutover.py).

    /var/lib/nbd-migrate/NAME/journal        or $XDG_STATE_HOME/nbd-migrate/NAME/journal
    /var/lib/nbd-migrate/NAME/lock           held by whoever acts, with its process id

The last whole line is the state; what a process that was killed has left half written is none, and the next
line takes its place. The lock belongs to the orchestrator and its guard together: both have the same open
file, so it is free only when both have ended.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from nbdserve.common.errors import UsageError
from overlay.formats.storage import sync_directory
from recipes.errors import MigrationError
from recipes.migrate.decoding import decoded
from recipes.migrate.lock import NAME as LOCK
from recipes.migrate.lock import Lock, holder
from recipes.migrate.progress import PrecopyProgress, Progress, RamProgress
from recipes.migrate.state import State
from recipes.plans.plan import Plan, way_to

LONGEST_NAME = 40
"""Characters: it stands in a line of ``list``, and in file names."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_JOURNAL, _PROGRESS, _FRESH = "journal", "progress", "progress.new"
SAMPLES, SPEED_ASKED, SPEED_TAKEN, HOOKS_LOG = "samples", "speed.asked", "speed.taken", "hooks.log"
CUTOVER_ASKED, CUTOVER_TAKEN = "cutover.asked", "cutover.taken"
"""Other files of a migration; see recipes/running/."""

_OF_ONE_RUN = (_PROGRESS, _FRESH, SAMPLES, SPEED_ASKED, SPEED_TAKEN, CUTOVER_ASKED, CUTOVER_TAKEN)
"""What must not be taken for another migration's of the same name."""


_OF_THE_TUNNEL = ("tunnel.log", "tunnel.pid", "tunnel.supervisor")
"""What its process makes, which is on neither host; see recipes/channel/ssh.py."""


class EmptyJournalError(MigrationError):
    """There is a migration of this name, and nothing has been written of it."""


def base_directory() -> Path:
    """Return where the migrations of this user are kept, each in a directory of its name."""
    home = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(home):
        return Path(home) / "nbd-migrate"
    if os.geteuid() == 0:
        return Path("/var/lib/nbd-migrate")
    try:
        return Path.home() / ".local/state/nbd-migrate"
    except RuntimeError as error:
        raise UsageError("there is no home directory for the journal: set XDG_STATE_HOME") from error


def directory_of(name: str) -> Path:
    """Return the directory of a migration, which need not be there. Raises UsageError."""
    return base_directory() / check_name(name)


def check_name(name: str) -> str:
    """Return the name; UsageError where it cannot be a migration's."""
    if not _is_name(name):
        raise UsageError(
            f"{name!r} cannot be a migration's name: use up to {LONGEST_NAME} letters, digits and ._- "
            "that begin with a letter or digit"
        )
    return name


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and len(text) <= LONGEST_NAME


def usable_name(text: str) -> str:
    """Make a migration's name of any text, such as a guest's name; "guest" where nothing is left of it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:LONGEST_NAME]
    return name or "guest"


def names() -> list[str]:
    """Return the migrations that are known, sorted."""
    base = base_directory()
    try:
        found = os.listdir(base)
    except FileNotFoundError:
        return []
    except OSError as error:
        remedy = "set XDG_STATE_HOME to a directory for the journals"
        raise MigrationError(f"{base}: {error.strerror}; {remedy}") from error
    # Others are no migrations', as a copy that somebody has made by hand.
    return sorted(name for name in found if _is_name(name) and _has_journal(base / name))


def _has_journal(directory: Path) -> bool:
    """Tell whether there is one, as far as we may know."""
    try:
        os.lstat(directory / _JOURNAL)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def known() -> Iterator[State]:
    """Yield the last state of each migration that has one which can be read."""
    for name in names():
        with suppress(MigrationError):
            yield last(name)


def of_destination(plan: Plan) -> list[State]:
    """Return the migrations that make an image that this plan makes, on the same host."""
    targets = {disk.target for disk in plan.disks}
    return [
        state
        for state in known()
        if way_to(state.plan.destination) == way_to(plan.destination)
        and targets & {disk.target for disk in state.plan.disks}
    ]


def history(name: str) -> list[State]:
    """Return all states of a migration, the last one last; locks nothing.

    Raises MigrationError when there is no such migration, or its journal cannot be read.
    """
    path, lines = _read(name)
    # What became of an earlier one is of no account where the last one is whole.
    earlier = []
    for line in lines[:-1]:
        with suppress(MigrationError):
            earlier.append(_parsed(path, line))
    return [*earlier, _parsed(path, lines[-1])]


def last(name: str) -> State:
    """Return the state of a migration, locking nothing; raises as ``history`` does."""
    path, lines = _read(name)
    return _parsed(path, lines[-1])


def _read(name: str) -> tuple[Path, list[bytes]]:
    """Return the lines of a journal, at least one; raises MigrationError, EmptyJournalError."""
    path = base_directory() / check_name(name) / _JOURNAL
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            lines = list(_whole_lines(file.read()))
    except FileNotFoundError as error:
        raise MigrationError(f"there is no migration {name}: see nbd-migrate list") from error
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from error
    if not lines:
        raise EmptyJournalError(f"{name}: nothing was begun; nbd-migrate cleanup {name} forgets it")
    return path, lines


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file. Raises OSError, EINVAL for any other, as a FIFO, which would be waited for."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file")
    return fd


@dataclass(frozen=True)
class Told:
    """How far the stream was, or what comes before it, and when that was told, in seconds since the epoch."""

    time: float
    progress: Progress | None = None
    ram: RamProgress | None = None
    precopy: PrecopyProgress | None = None


def progress(name: str) -> Told | None:
    """Return how far the stream was when that was told last; None if unknown."""
    path = base_directory() / check_name(name) / _PROGRESS
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            told = decoded(Told, json.loads(file.read()))
    except (OSError, ValueError, RecursionError):
        return None
    return told if told.progress or told.ram or told.precopy else None


def actor(name: str) -> int:
    """Return the process that acts on a migration: its id, 0 if nobody does, or UNKNOWN_PROCESS."""
    return holder(base_directory() / check_name(name))


class Journal:
    """The journal of one migration, to be written to by the one process that holds its lock.

    Made by ``begin``, ``take_over`` or ``inherit``.
    """

    def __init__(self, directory: Path, fd: int, lock: Lock) -> None:
        """``fd`` is that of the file. Raises MigrationError when that does not hold what we have written."""
        self.directory = directory
        self.fd = fd
        self.lock = lock
        self.held = False
        self.unwritten = ""
        """Why the state is not in the file, if it is not."""
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        self._end = content.rfind(b"\n") + 1
        lines = list(_whole_lines(content))
        self.state = _parsed(directory / _JOURNAL, lines[-1]) if lines else None

    @classmethod
    def begin(cls, name: str, base: Path | None = None) -> Self:
        """Open the journal for a new migration; one of this name that is over gives way.

        Raises MigrationError when one of this name is not over, JournalBusyError when somebody is at work.
        """
        directory = (base or base_directory()) / check_name(name)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MigrationError(
                f"{directory}: {error.strerror}; set XDG_STATE_HOME to a directory for the journals"
            ) from error
        journal = cls._opened(directory)
        if journal.state is not None and not journal.state.gives_way:
            state = journal.state
            journal.close()
            raise MigrationError(f"migration {name} {state.standing}; or give this one another --name")
        journal.begin_anew()
        return journal

    @classmethod
    def take_over(cls, name: str) -> Self:
        """Open the journal of a migration to act on it; raises as ``begin`` and ``Lock.taken`` do."""
        directory = base_directory() / check_name(name)
        if not directory.is_dir():
            raise MigrationError(f"there is no migration {name}: see nbd-migrate list")
        return cls._opened(directory)

    @classmethod
    def _opened(cls, directory: Path) -> Self:
        with ExitStack() as stack:
            lock = Lock.taken(directory)
            stack.callback(lock.release)
            lock.sign()
            path = directory / _JOURNAL
            try:
                fd = open_regular(path, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                raise MigrationError(f"{path}: {error.strerror}") from error
            stack.callback(os.close, fd)
            journal = cls(directory, fd, lock)
            stack.pop_all()
            return journal

    @classmethod
    def inherit(cls, directory: Path, fd: int, lock_fd: int) -> Self:
        """Go on with a journal of which the caller has been given the file and the lock, both open."""
        return cls(directory, fd, Lock(lock_fd))

    def append(self, state: State, *, sync: bool = True) -> State:
        """Write a state down, and with ``sync`` make it durable; return it with the time. Raises OSError."""
        state = replace(state, time=time.time())
        if self.held:
            self.state = state
            return state
        line = state.to_json().encode() + b"\n"
        # What stands behind the last whole line is none: it is written over.
        os.ftruncate(self.fd, self._end)
        written = 0
        while written < len(line):
            written += os.pwrite(self.fd, line[written:], self._end + written)
        if sync:
            os.fsync(self.fd)
        if not self._end:
            sync_directory(self.directory)
            sync_directory(self.directory.parent)
        self._end += len(line)
        self.state, self.unwritten = state, ""
        return state

    def remember(self, state: State, why: str) -> None:
        """Take this for the state although it could not be written."""
        self.state, self.unwritten = state, why

    def begin_anew(self) -> None:
        """Forget what was there when the next state is written, and not before."""
        for name in _OF_ONE_RUN:
            (self.directory / name).unlink(missing_ok=True)
        self._end, self.state = 0, None

    def note_progress(
        self,
        progress: Progress | None = None,
        ram: RamProgress | None = None,
        precopy: PrecopyProgress | None = None,
    ) -> None:
        """Leave word of how far the stream is, or what comes before it; unlike a state it may be lost."""
        path = self.directory / _PROGRESS
        fresh = self.directory / _FRESH
        with suppress(OSError):
            fresh.write_text(json.dumps(asdict(Told(time.time(), progress, ram, precopy))))
            fresh.replace(path)

    def close(self) -> None:
        """Let go of the migration; where nothing was ever written, nothing is left of it."""
        if not os.fstat(self.fd).st_size:
            for name in (_JOURNAL, LOCK):
                (self.directory / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.directory.rmdir()
        os.close(self.fd)
        self.lock.release()


def remove(name: str) -> None:
    """Remove what is known of a migration that nobody acts on; raises as ``Journal.take_over`` does."""
    directory = base_directory() / check_name(name)
    if not directory.is_dir():
        raise MigrationError(f"there is no migration {name}: see nbd-migrate list")
    with Lock.taken(directory):
        try:
            # The journal as the last: until then it is known.
            for known in (*_OF_ONE_RUN, HOOKS_LOG, *_OF_THE_TUNNEL, LOCK, _JOURNAL):
                (directory / known).unlink(missing_ok=True)
        except OSError as error:
            raise MigrationError(f"{error.filename}: {error.strerror}") from error
        # What somebody else has put there stays.
        with suppress(OSError):
            directory.rmdir()


def _whole_lines(content: bytes) -> Iterator[bytes]:
    return (line for line in content[: content.rfind(b"\n") + 1].splitlines() if line)


def _parsed(path: Path, line: bytes) -> State:
    try:
        return State.from_json(line.decode())
    except (MigrationError, UnicodeDecodeError) as error:
        name = path.parent.name
        raise MigrationError(f"{path}: {error}; to forget it: nbd-migrate cleanup --force {name}") from error
