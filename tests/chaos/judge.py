"""One round of chaos: a migration, what strikes it, what is typed, and whether all is as it must be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from recipes.migrate import journal
from tests.chaos.schedules import FATAL, Kind, Schedule
from tests.chaos.settings import Place, drawn_place
from tests.chaos.striking import Striker
from tests.support.many_disks import ManyDisks
from tests.support.processes import Process, wait_until
from tests.support.vms import NBD_MIGRATE, Role, monitor

LIMIT = 240.0
"""Seconds after the last fault in which a command must have ended, one way or the other."""

COMMANDS = 16
"""So many must do; more than there are faults, as each may cost one."""

HAS_GUEST = ("running", "io-error", "paused")
"""The states of a QEMU on B whose guest has arrived."""


@dataclass(frozen=True)
class Played:
    """What a round has come to. ``struck`` are the faults that really did, in their order."""

    struck: tuple[str, ...]
    counts: Counter[Kind]
    outcome: str


def play(directory: Path, schedule: Schedule) -> Played:
    """Play a round. AssertionError when something is not as it must be; it says what has struck."""
    with drawn_place(directory, schedule.setting) as place:
        striker = Striker(place, list(schedule.faults))
        try:
            outcome = Judge(place, schedule, striker).judge()
        except AssertionError as error:
            raise AssertionError(f"after {', '.join(striker.struck)}: {error}") from error
        return Played(tuple(striker.struck), striker.counts, outcome)


@dataclass
class Judge:
    """The operator of a round, and whoever looks at it afterwards."""

    place: Place
    schedule: Schedule
    striker: Striker
    commands: int = 0
    said: str = ""

    def judge(self) -> str:
        """Run the plan, and go on until all is done or the guest has ended with its QEMU."""
        status = self._go(["run", str(self.stage.plan_file())])
        while True:
            on_a, on_b = state(self.stage, "a"), state(self.stage, "b")
            assert not (on_a == "running" and on_b == "running"), f"the guest runs twice: {self.said}"
            if on_b in HAS_GUEST and on_a != "running":
                if status == 0:
                    return self._complete()
                status = self._go(self._rest(), on_b=True)
            elif on_a in HAS_GUEST:
                assert status != 0, self.said
                if on_a == "running":
                    self.stage.wait_until_guest_works("a")
                status = self._go(self._again())
            else:
                return self._ended(status)

    @property
    def stage(self) -> ManyDisks:
        """What is moved."""
        return self.place.stage

    def _go(self, words: list[str], *, on_b: bool = False) -> int:
        """Type a command, let strike what is left; its exit code, when it and its guard have ended.

        ``on_b``: the guest is there, and most of the steps have been done.
        """
        self.commands += 1
        assert self.commands <= COMMANDS, f"so many commands did not do: {self.said}"
        log = self.stage.directory / f"command{self.commands}.log"
        with Process([str(NBD_MIGRATE), *words], log) as command:
            status = self.striker.accompany(command, by_steps=not on_b, limit=LIMIT)
            wait_until(lambda: not Role.GUARD.find(self.stage.directory), "the guard ends", 30.0, 0.1)
            self.said = f"nbd-migrate {' '.join(words)}: {status}: {command.output()}"
        assert "Traceback" not in self.said, self.said
        if not self.striker.waiting and self.striker.quiet_commands > 2:
            raise AssertionError(f"without another fault it does not come to its end: {self.said}")
        return status

    def _rest(self) -> list[str]:
        """What the operator is told to type when the guest is on B."""
        [name] = journal.names()
        if self.schedule.rest == "finish" and self.commands == 1:
            return ["finish", str(self.stage.directory / "plan.toml")]
        return ["resume", name]

    def _again(self) -> list[str]:
        """What is typed while the guest is on A: where a command has died, to go on with it."""
        names = journal.names()
        if names and self.striker.killed & {Role.ORCHESTRATOR, Role.GUARD}:
            return ["resume", names[0]]
        # What shares a connection of ssh outlives the command by some seconds.
        self.stage.wait_until_only(set())
        return ["run", str(self.stage.directory / "plan.toml")]

    def _complete(self) -> str:
        """The guest works on B, on nothing but its own disks, which hold what they must."""
        self.stage.wait_until_guest_works("b")
        self.stage.wait_until_only({Role.B})
        assert not Role.A.find(self.stage.directory), f"A's QEMU is still there: {self.said}"
        self._check(self.stage.verdict(self.stage.stop_b()))
        return "the guest and its disks are on B" + self._typed()

    def _ended(self, status: int) -> str:
        """The guest has ended with its QEMU, which was killed."""
        assert self.striker.killed & set(FATAL), f"the guest is nowhere: {self.said}"
        if Role.A in self.striker.killed and not any(disk.target.exists() for disk in self.stage.disks):
            assert status != 0, self.said
            wait_until(lambda: not self.stage.started(), "what was started has ended", 30.0, 0.1)
            return "the guest has ended with A's QEMU"
        while status != 0:
            status = self._go(self._rest(), on_b=True)
        self.stage.wait_until_only(set())
        self._check(self.stage.verdict())
        return f"the guest has ended with B's QEMU; {self.schedule.rest} completed its disks{self._typed()}"

    def _check(self, wrong: list[str]) -> None:
        assert not wrong, f"{len(wrong)} sectors are wrong, such as {wrong[:4]}: {self.said}"

    def _typed(self) -> str:
        return f", by {self.commands} commands" if self.commands > 1 else ""


def state(stage: ManyDisks, host: str) -> str:
    """What the QEMU on ``a`` or ``b`` says of its guest; empty where there is no QEMU."""
    role, address = (Role.A, stage.monitor_a) if host == "a" else (Role.B, stage.monitor_b)
    if not role.find(stage.directory):
        return ""
    with monitor(address) as qemu:
        return qemu.state
