"""Faults while they strike, and how all of them are mended again."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from tests.chaos.link import Trouble
from tests.chaos.schedules import OF_LINK, Fault, Kind
from tests.chaos.settings import Place
from tests.support.processes import Process, check, run
from tests.support.vms import Role

PAUSE = 0.02
"""Seconds between two looks at a command and at what is due."""


def has_begun(step: int, command: Process) -> bool:
    """Whether a command has told that it is at this step; step 0 begins with the command."""
    return step == 0 or f"step {step} " in command.output()


@dataclass
class Lasting:
    """A fault that is there until ``due``; ``mend`` ends it, and says whether it has struck."""

    fault: Fault
    due: float
    mend: Callable[[], bool]


@dataclass
class Striker:
    """Plays a schedule's faults, in their order, on whatever command is running."""

    place: Place
    waiting: list[Fault]
    struck: list[str] = field(default_factory=list)
    counts: Counter[Kind] = field(default_factory=Counter)
    killed: set[Role] = field(default_factory=set)
    quiet_commands: int = 0
    """How many commands in a row were struck by nothing."""
    _lasting: list[Lasting] = field(default_factory=list)

    def accompany(self, command: Process, *, by_steps: bool, limit: float) -> int:
        """Strike while a command runs; its exit code.

        AssertionError where it does not end in ``limit`` s after the last fault has passed. ``by_steps``: the
        faults wait for the steps that the command tells of.
        """
        since = quiet = time.monotonic()
        left = len(self.waiting)
        while command.running:
            now = time.monotonic()
            self._mend(now)
            if self.waiting and self._is_due(self.waiting[0], command, since, by_steps):
                self._strike(self.waiting.pop(0))
                since = quiet = time.monotonic()
            if self.waiting and by_steps and not has_begun(self.waiting[0].step, command):
                since = now
            if self._lasting:
                quiet = now
            assert now - quiet < limit, f"the command did not end within {limit:g} s: {command.output()}"
            time.sleep(PAUSE)
        self._mend(float("inf"))
        self.quiet_commands = 0 if len(self.waiting) < left else self.quiet_commands + 1
        return command.wait()

    def _is_due(self, fault: Fault, command: Process, since: float, by_steps: bool) -> bool:
        begun = not by_steps or has_begun(fault.step, command)
        # One at a time of those that pass, so that each is known to have been mended.
        free = not any(
            each.fault.kind is fault.kind or {each.fault.kind, fault.kind} <= set(OF_LINK)
            for each in self._lasting
        )
        return begun and free and time.monotonic() - since >= fault.delay

    def _mend(self, until: float) -> None:
        for each in [each for each in self._lasting if each.due <= until]:
            self._lasting.remove(each)
            if each.mend():
                self._note(each.fault)

    def _note(self, fault: Fault) -> None:
        self.struck.append(str(fault))
        self.counts[fault.kind] += 1

    def _strike(self, fault: Fault) -> None:
        if fault.kind is Kind.KILL:
            assert fault.victim
            if self._kill(fault.victim):
                self._note(fault)
            return
        mend = self._begin(fault)
        self._lasting.append(Lasting(fault, time.monotonic() + fault.lasting, mend))

    def _kill(self, victim: Role) -> bool:
        found = victim.find(self.place.stage.directory)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                self.killed.add(victim)
        return bool(found)

    def _begin(self, fault: Fault) -> Callable[[], bool]:
        if fault.kind is Kind.STOP:
            assert fault.victim
            return self._stop(fault.victim)
        if fault.kind is Kind.FULL:
            return self._fill()
        if fault.kind is Kind.UNREADABLE:
            return self._spoil()
        link = self.place.link
        assert link
        before = link.affected
        link.set(Trouble(fault.kind.value))

        def well() -> bool:
            link.set(Trouble.NONE)
            return link.affected > before

        return well

    def _stop(self, victim: Role) -> Callable[[], bool]:
        stopped = victim.find(self.place.stage.directory)
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

        def go_on() -> bool:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
            return bool(stopped)

        return go_on

    def _fill(self) -> Callable[[], bool]:
        """Leave no room; it has struck when all was used by its end, and an image still not whole."""
        room = self.place.room

        def used() -> int:
            there = os.statvfs(room)
            return (there.f_blocks - there.f_bfree) * there.f_frsize

        # No less than what there is can be left, which grows meanwhile.
        for spare in (64, 512, 2048, 8192):
            if run("mount", "-o", f"remount,size={(used() >> 10) + spare}k", room).returncode == 0:
                break

        def make_room() -> bool:
            is_full = os.statvfs(room).f_bfree == 0
            targets = [disk.target for disk in self.place.stage.disks]
            part = any(
                each.exists() and each.stat().st_blocks * 512 < each.stat().st_size for each in targets
            )
            check("mount", "-o", f"remount,size={self.place.size >> 10}k", room)
            return is_full and part

        return make_room

    def _spoil(self) -> Callable[[], bool]:
        """Let reads of A's images fail; it has struck when one has."""
        trigger, failed = self.place.trigger, self.place.failed
        before = failed.stat().st_size if failed.exists() else 0
        trigger.touch()

        def heal() -> bool:
            trigger.unlink()
            return failed.exists() and failed.stat().st_size > before

        return heal
