"""One process under a supervisor (supervisor.py), or one that was under one in an earlier run.

The supervisor ends it when its holder ends, even by SIGKILL, until it is released: then it lives on.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.messages import message_in
from recipes.hosts.process_group import end_group
from recipes.processes.lastwords import last_words
from recipes.processes.named_socket import socket_beside

COMMAND = 60.0
"""Seconds that a short command about a process may take."""

SUPERVISOR_END = 10.0
"""Seconds until a supervisor that has been let go of has ended, with what it kept."""

SUPERVISOR_ANSWER = 10.0
"""Seconds in which a supervisor must obey, and tell of an end; one that is stopped (SIGSTOP) does neither."""

REMOTE_LOOK = 1.0
"""Seconds between two looks for a process on another host whose supervisor is of no use."""

_IS_OURS = 'grep -qs "^State:.[^XZ]" "/proc/$1/status" && grep -qszF -- "$2" "/proc/$1/cmdline"'
"""Whether process $1 is there, is no zombie, and has $2 in its command line: ids are used again."""

LOOK = f"if {_IS_OURS}; then echo lives; else echo ended; fi"
"""Says whether process $1, which $2 tells, is there."""

_KILL = f'if {_IS_OURS}; then kill "-$3" -- "-$1" || kill "-$3" "$1"; fi 2>/dev/null'
"""Sends signal $3 to process $1, which $2 tells, and to all that it has started in its session."""

KILL = 15.0
"""Seconds beyond its grace until a process is given up that not even SIGKILL ends."""

RELEASE, LEAVE = b"release\n", b"leave\n"
"""What a supervisor is told; see recipes/processes/supervisor.py."""


async def lives(host: Host, pid: int, mark: str, limit: float) -> bool:
    """Tell whether a process with this mark is there on a host.

    Raises MigrationError if that is not said within ``limit`` seconds.
    """
    said = await host.run("sh", "-c", LOOK, "sh", str(pid), mark, limit=limit)
    return said.strip() == "lives"


def pidfd_of(pid: int) -> int:
    """Return a file descriptor for the process, readable at its end.

    It is -1 when its supervisor has seen it end.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


@dataclass(frozen=True)
class Lifeline:
    """What holds a process: who has both of these file descriptors shares in its life.

    name      what messages call the process
    words     our end of its supervisor's standard input
    messages  its supervisor's standard output
    """

    name: str
    words: int
    messages: int


class Child:
    """A process that was started through a supervisor.

    name  what messages call it
    host  where it runs
    pid   its process id there
    log   what it writes to, where it was started by us
    mark  what its command line has and no other process's

    One that was started in an earlier run is released. Its ``supervisor`` is what leads to the one that it
    was started by (attach.py); where that is dead, or has left, it has neither this nor a ``lifeline``.
    """

    def __init__(
        self,
        name: str,
        host: Host,
        pid: int,
        lifeline: Lifeline | None = None,
        supervisor: asyncio.subprocess.Process | None = None,
        *,
        mark: str = "",
        log: Path | None = None,
        ready: Path | None = None,
        released: bool = False,
        adopted: bool = False,
    ) -> None:
        self.name = name
        self.host = host
        self.pid = pid
        self._lifeline = lifeline
        self._supervisor = supervisor
        self.mark = mark
        self.log = log
        self._ready_file = ready
        self.released = released
        self._adopted = adopted
        self.status: int | None = None
        self._tail = ""
        self._orphan = self._mute = self._removed = False
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_released = asyncio.Event()
        self._exited = asyncio.Event()
        self._gone = asyncio.Event()
        self._pidfd = -1 if host.remote else pidfd_of(pid)
        if self._pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._pidfd, self._exited.set)
        elif not host.remote:
            self._exited.set()

    @property
    def running(self) -> bool:
        """Tell whether the process is still there, as far as is known."""
        return not self._gone.is_set()

    async def ready(self, limit: float) -> None:
        """Wait until the process has made its file ``ready``.

        Raises MigrationError when it ends first, or is not ready after ``limit`` seconds.
        """
        await first_of(limit, self._ready, self._gone)
        if not self.running:
            raise MigrationError(f"{self.name} {await self.wait()}")
        if not self._ready.is_set():
            raise MigrationError(f"{self.name} was not ready within {limit:g} s")

    def has_its_file(self) -> None:
        """Know that the process is ready: its supervisor says so once, to a holder who may be gone by now."""
        self._ready.set()

    async def wait(self) -> str:
        """Wait until the process has ended; return how, in words, with the last line that it wrote."""
        await self._gone.wait()
        if self.status is None and self._adopted:
            return "has ended"
        if self.status is None:
            return (
                "ended, as its supervisor was killed"
                if self._orphan
                else "ended, and its supervisor does not say how"
            )
        if self.status < 0:
            return f"was ended by signal {-self.status}"
        why = last_words(self._tail)
        return f"ended with code {self.status}" + (f": {why}" if why else "")

    def release(self) -> bool:
        """Let the process live on by itself when we end; False when its supervisor is dead: it ends too."""
        if not self.released:
            self.released = self._say(RELEASE)
        return self.released

    def leave(self) -> None:
        """Nobody takes the process over after us: its supervisor ends with us, too, if it is released."""
        self._say(LEAVE)

    async def released_for_sure(self) -> None:
        """Wait until the supervisor has said that the process is released.

        Raises MigrationError when it does not, as the word may be lost on its way to another host, and when
        the process has ended.
        """
        if self._supervisor is None:
            return
        await first_of(SUPERVISOR_ANSWER, self._is_released, self._gone)
        if not self.running:
            raise MigrationError(f"{self.name} {await self.wait()}")
        if not self._is_released.is_set():
            raise MigrationError(f"{self.name} would not outlive us: its supervisor does not answer")

    async def stop(self, seconds: float) -> None:
        """End the process: SIGTERM, and SIGKILL when ``seconds`` have passed. Returns when it has ended.

        Raises MigrationError when it is there even then.
        """
        # A supervisor may be dead, or have been stopped (SIGSTOP).
        told = self._say(f"stop {seconds:g}\n".encode())
        self._mute = not (told and await first_of(SUPERVISOR_ANSWER, self._stopping, self._gone))
        if self._mute:
            await self._signal(signal.SIGTERM)
        await self._ended(seconds)
        if self.running:
            await self._signal(signal.SIGKILL)
            await self._ended(KILL)
        if self.running:
            raise MigrationError(f"{self.name} (process {self.pid}) cannot be ended, not even killed")

    async def follow(self, messages: asyncio.StreamReader | None = None) -> None:
        """Learn of the end of the process: from its supervisor, or from the kernel when that says nothing."""
        watching = asyncio.create_task(self._watch())
        try:
            if messages:
                await self._listen(messages)
            else:
                await self._end()
                self._gone.set()
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        await self._exited.wait()
        await first_of(SUPERVISOR_ANSWER, self._gone)
        self._gone.set()

    async def _listen(self, messages: asyncio.StreamReader) -> None:
        """Read what the supervisor says until the process has ended; its own death must leave no orphan."""
        while line := await messages.readline():
            message = message_in(line)
            if "ready" in message:
                self._ready.set()
            if "released" in message:
                self._is_released.set()
            if "stopping" in message:
                self._stopping.set()
            if "exited" in message:
                self.status, self._tail = message["exited"], message["tail"]
                self._gone.set()
        if self.running:
            self._orphan = True
            if not self.released:
                await self._signal(signal.SIGKILL)
            await self._end()
            await self._remove_socket()
            self._gone.set()

    def kill_command(self) -> list[str]:
        """Return the command that kills the process when its supervisor is of no use.

        It leaves another one alone that has the id by now, and ends when the process has ended.
        """
        script = 'while grep -qszF -- "$2" "/proc/$1/cmdline"; do kill -9 "$1"; sleep 0.1; done'
        return self.host.argv(["sh", "-c", script, "sh", str(self.pid), self.mark])

    async def close(self) -> None:
        """Let go of the lifeline: the supervisor ends what was not released, and itself."""
        if self._lifeline:
            os.close(self._lifeline.words)
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
        if self._supervisor and self._mute:
            await end_group(self._supervisor)
        if self._supervisor:
            await give_up(self._supervisor)

    async def _ended(self, seconds: float) -> None:
        """Wait for so many seconds until the process has ended, whoever tells."""
        looking = asyncio.create_task(self._end())
        telling = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({looking, telling}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                # Its supervisor knows how it has ended.
                await asyncio.wait({telling}, timeout=0 if self._mute else SUPERVISOR_ANSWER)
                self._gone.set()
        finally:
            looking.cancel()
            telling.cancel()

    async def _end(self) -> None:
        """Wait until the process has ended, without its supervisor."""
        if not self.host.remote:
            await self._exited.wait()
            return
        while True:
            await asyncio.sleep(REMOTE_LOOK)
            # A host that cannot be reached says nothing about the process.
            with suppress(MigrationError):
                words = ("sh", "-c", LOOK, "sh", str(self.pid), self.mark)
                look = await self.host.run(*words, limit=COMMAND)
                if look.strip() == "ended":
                    return

    async def _remove_socket(self) -> None:
        """Remove what a supervisor that was killed has left, before another one may listen there."""
        if self.log and not self._adopted and self.released and not self._removed:
            self._removed = True
            with suppress(MigrationError):
                await self.host.run("rm", "-f", "--", str(socket_beside(self.log)), limit=COMMAND)

    async def tidy(self) -> None:
        """Remove what a process that has ended has left, where its supervisor is dead and cannot."""
        if self._orphan and not self.running:
            await self._remove_socket()
        script = 'if [ "$(cat "$1" 2>/dev/null)" = "$2" ]; then rm -f -- "$1"; fi'
        if self._ready_file and not self.running and self.status is None:
            with suppress(MigrationError):
                words = ("sh", "-c", script, "sh", str(self._ready_file), str(self.pid))
                await self.host.run(*words, limit=COMMAND)

    async def _signal(self, number: signal.Signals) -> None:
        """Signal the process directly, when its supervisor is not there to do it."""
        try:
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)
                return
        except ProcessLookupError:
            return
        except PermissionError:
            pass  # the host's prefix, as sudo, has more rights than we have
        with suppress(MigrationError):
            words = ("sh", "-c", _KILL, "sh", str(self.pid), self.mark, str(number.value))
            await self.host.run(*words, limit=COMMAND)

    def _say(self, word: bytes) -> bool:
        """Give the supervisor a word; False when there is no supervisor any more."""
        if self._lifeline is None:
            return False
        try:
            os.write(self._lifeline.words, word)
        except BrokenPipeError:
            return False
        return True


async def first_of(seconds: float, *events: asyncio.Event) -> bool:
    """Wait until one of the events is set, for so many seconds; whether one is."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
    return any(event.is_set() for event in events)


async def give_up(supervisor: asyncio.subprocess.Process) -> None:
    """Wait until a supervisor that has been let go of has ended; what leads to it may have to be killed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SUPERVISOR_END):
            await supervisor.wait()
    await end_group(supervisor)
