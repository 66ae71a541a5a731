"""The guard: a second process that acts when the orchestrator is killed in the middle of a migration.

Supervisors alone cannot do that: an orchestrator that dies while the guest stands still before the switch-
over would leave it standing, and one that dies during the switch-over leaves it open which QEMU may live.
The guard holds every child's lifeline too, so nothing ends before it has asked the source who has the guest.
Then it either gives the guest back to the source and ends the children, or releases them (watch.py).

It has a deputy, which is told the same and acts when the guard is dead as well, or hangs: a source that
stands still before the switch-over stands there for ever, and no two deaths may leave it there.

The orchestrator's end is Guard; the process is this module. They share a socket of messages, and the end of
file on it is the orchestrator's death.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from nbdserve.common import clock, program
from nbdserve.common.errors import OperatorError
from recipes.errors import MigrationError
from recipes.hosts.host import module
from recipes.hosts.spawn import spawn
from recipes.migrate.watch import Orders, Watch
from recipes.processes.child import Child, Lifeline

SEND = 2.0
"""Seconds in which a guard must take a message; one that does not is as good as dead."""

CLOSE = 5.0
"""Seconds in which a guard that was dismissed must have ended; then it is killed."""

TURN = 240.0
"""Seconds in which the guard must have done what it does; then its deputy kills it and takes its turn."""


@dataclass
class Watcher:
    """A guard's process, and our end of the socket to it."""

    process: asyncio.subprocess.Process
    channel: socket.socket

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Send a message; one that cannot take it is noticed by Guard.wait()."""
        if self.channel.fileno() < 0:
            return
        try:
            socket.send_fds(self.channel, [data], fds)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """Kill it; it may have ended."""
        # Not by asyncio, which may read its exit status at that, before its watcher does.
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)


class Guard:
    """The orchestrator's end of the guard and its deputy, made by start_guard()."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def share(self, lifeline: Lifeline) -> None:
        """Share a child's life, before it begins."""
        self._send("share", lifeline.name, (lifeline.words, lifeline.messages))

    def know(self, child: Child) -> None:
        """How to kill a child whose supervisor is dead."""
        self._send("kill", [child.name, child.kill_command()])

    async def wait(self) -> str:
        """Wait until one of them has ended, which it does not do by itself; return how, in words."""
        waits = [asyncio.ensure_future(each.process.wait()) for each in self._watchers]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        return f"ended with status {done.pop().result()}"

    def dismiss(self) -> None:
        """Let the guard go: nothing that happens from now on concerns it."""
        self._send("dismiss", None)
        for watcher in self._watchers:
            watcher.channel.close()

    async def close(self) -> None:
        """Dismiss the guard and see it end. The orchestrator has decided where the guest is."""
        self.dismiss()
        ends = asyncio.gather(*(each.process.wait() for each in self._watchers))
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE):
                await asyncio.shield(ends)
        for watcher in self._watchers:
            watcher.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE):
                await ends

    def _send(self, kind: str, value: object, fds: Sequence[int] = ()) -> None:
        for watcher in self._watchers:
            watcher.send(json.dumps({kind: value}).encode(), fds)


async def start_guard(orders: Orders) -> Guard:
    """Start the guard of this process, and its deputy."""
    done, tell = os.pipe()
    try:
        guard = await _start(orders, {"tell": tell})
        chief = os.pidfd_open(guard.process.pid)
        try:
            deputy = await _start(orders, {"done": done, "chief": chief})
        except BaseException:
            await Guard([guard]).close()
            raise
        finally:
            os.close(chief)
    finally:
        os.close(done)
        os.close(tell)
    return Guard([guard, deputy])


async def _start(orders: Orders, fds: dict[str, int]) -> Watcher:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(SEND)
    try:
        with theirs:
            process = await spawn(
                module("guard", json.dumps(asdict(orders)), json.dumps(fds)),
                stdin=theirs.fileno(),
                pass_fds=(orders.file, orders.lock, *fds.values()),
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    return Watcher(process, ours)


def has_acted(done: int, chief: int) -> bool:
    """Tell whether the guard has done what was to be done; one that is dead, or late and then killed, has
    not.
    """
    poll = select.poll()
    poll.register(done, select.POLLIN)
    if poll.poll(TURN * 1000) and os.read(done, 1):
        return True
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(chief, signal.SIGKILL)
    return False


def main(arguments: Sequence[str]) -> int:
    """Watch until the orchestrator dies or dismisses us; return an exit code."""
    # Whoever ends the orchestrator by a signal to its group or terminal must not end the guard with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    orders, fds = (json.loads(each) for each in (*arguments, "{}")[:2])
    watch = Watch(Orders(**orders))
    with socket.socket(fileno=0) as channel:
        orphaned = watch.listen(channel)
    if not orphaned or ("done" in fds and has_acted(fds["done"], fds["chief"])):
        return program.EXIT_DONE

    def body() -> int:
        try:
            outcome = clock.run(watch.act())
        except OperatorError as error:
            tell(fds)
            raise MigrationError(f"the orchestrator was killed: {error}") from error
        tell(fds)
        program.complain("nbd-migrate", f"the orchestrator was killed: {outcome}")
        return program.EXIT_DONE

    return program.run("nbd-migrate", body)


def tell(fds: dict[str, int]) -> None:
    """Tell the deputy that there is nothing left to do."""
    if "tell" in fds:
        with suppress(BrokenPipeError):
            os.write(fds["tell"], b"x")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
