"""One ssh connection to each host, shared by all that runs there.

OpenSSH does that itself (ControlMaster): the first command opens the connection, and a process of its own
keeps it; whoever comes later is one more session in it. Where it is lost, the next command opens another;
where the host allows no more sessions in one connection (MaxSessions of its sshd), ssh makes one more.

Its sockets lie in a directory of ours, which is removed in the end. A connection that nobody uses, as
everybody was killed, closes itself after PERSIST seconds.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from recipes.errors import MigrationError
from recipes.hosts import ssh
from recipes.hosts.host import Host
from recipes.hosts.process_group import end_group
from recipes.hosts.spawn import spawn

PERSIST = 20
"""Seconds for which a connection stays that nobody uses."""

EXIT = 5.0
"""Seconds in which a connection that is told to end must answer."""

PREFIX = "nbd-migrate-ssh-"
"""Of the directory's name."""

_ROOM = 107 - 40 - 18
"""Bytes that its path may have: a socket's name is a hash of 40 digits, and a temporary one is longer."""


@dataclass(frozen=True)
class Sharing:
    """The directory of the sockets, for as long as its descriptor is open."""

    directory: Path
    fd: int

    @classmethod
    def begin(cls) -> Self:
        """Make the directory, for the user alone. What others have left who were killed is removed.

        Raises MigrationError where there is no place for it.
        """
        for place in _places():
            _sweep(place)
            with suppress(OSError):
                return cls.join(Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)))
        raise MigrationError(
            "there is no place for the sockets of ssh; set TMPDIR to a directory with a short path"
        )

    @classmethod
    def join(cls, directory: Path) -> Self:
        """Use a directory that somebody else has made, which nobody sweeps while we live. Raises OSError."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not os.fstat(fd).st_nlink:
                raise FileNotFoundError(f"{directory} has just been removed")
        except BaseException:
            os.close(fd)
            raise
        return cls(directory, fd)

    @property
    def options(self) -> tuple[str, ...]:
        """Return what ssh is told besides."""
        wanted = (
            *("ControlMaster=auto", f"ControlPath={self.directory}/%C", f"ControlPersist={PERSIST}"),
            # What a configuration may have for people who log in, and no command can use.
            *("ClearAllForwardings=yes", "RemoteCommand=none", "RequestTTY=no"),
        )
        return tuple(word for option in wanted for word in ("-o", option))

    async def end(self, hosts: Sequence[Host]) -> None:
        """Close the connections and remove the directory; never fails."""
        for host in hosts:
            if host.shared:
                await _exit(host)
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self.fd)


@asynccontextmanager
async def sharing(*hosts: Host, directory: str = "") -> AsyncIterator[tuple[Host, ...]]:
    """Share a connection to each of the hosts that have an address, and close it in the end.

    With ``directory``, those of somebody who has been killed are used, and closed.
    """
    if not any(host.address for host in hosts):
        yield hosts
        return
    shared = _joined(directory)
    ours = tuple(
        replace(host, shared=shared.options, control=str(shared.directory)) if host.address else host
        for host in hosts
    )
    try:
        yield ours
    finally:
        await shared.end(ours)


def _joined(directory: str) -> Sharing:
    """Return the directory of somebody who was killed; one of our own if he had the time to remove it."""
    if directory:
        with suppress(OSError):
            return Sharing.join(Path(directory))
    return Sharing.begin()


async def _exit(host: Host) -> None:
    """Tell the process that keeps the connection to end, if there is one."""
    words = ssh.with_options(host.shell, (*host.options, *host.shared, "-O", "exit"))
    with suppress(OSError):
        quiet = asyncio.subprocess.DEVNULL
        process = await spawn(words, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(EXIT):
                await process.wait()
        await end_group(process)


def _places() -> list[str]:
    """Return the directories that have room for it, the best first."""
    wanted = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp", "/run")
    longest = _ROOM - len(f"/{PREFIX}12345678/")
    return [place for place in wanted if place.startswith("/") and len(os.fsencode(place)) <= longest]


def _sweep(place: str) -> None:
    """Remove the directories of those who have been killed: nobody holds these."""
    with suppress(OSError):
        for each in os.scandir(place):
            if each.name.startswith(PREFIX) and stat.S_ISDIR(each.stat(follow_symlinks=False).st_mode):
                _remove_abandoned(Path(each.path))


def _remove_abandoned(directory: Path) -> None:
    with suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(fd)
