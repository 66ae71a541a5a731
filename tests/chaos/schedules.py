"""What strikes a round of chaos, and when: drawn from the seed and the round's number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from tests.chaos.settings import ANY, CHOICES, Setting
from tests.support.vms import Role


class Kind(Enum):
    """A kind of fault. All but ``KILL`` last for a time, after which all is well again."""

    KILL = "kill"
    STOP = "stop"
    DROP = "drop"
    HOLD_ANSWERS = "hold answers"
    HOLD_REQUESTS = "hold requests"
    DELAY = "delay"
    CUT = "cut"
    FULL = "full"
    """No space left for B's images."""
    UNREADABLE = "unreadable"
    """Reads of A's images fail with EIO."""


OF_LINK = (Kind.DROP, Kind.HOLD_ANSWERS, Kind.HOLD_REQUESTS, Kind.DELAY, Kind.CUT)
OF_DISKS = (Kind.FULL, Kind.UNREADABLE)
FATAL = (Role.A, Role.B, Role.SUPERVISOR_OF_B)
"""With these the guest may end: one at most is killed in a round, and nothing strikes after it."""

STEPS = (0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6)
"""At which a fault is drawn; those of which there is more to be seen more often."""

SINCE = {
    Role.SERVER: 1,
    Role.SUPERVISOR_OF_SERVER: 1,
    Role.TUNNEL: 1,
    Role.CHANNEL: 1,
    Role.B: 3,
    Role.SUPERVISOR_OF_B: 3,
    Role.OVERLAY: 3,
    Role.ONE_OVERLAY: 3,
    Role.SUPERVISOR_OF_OVERLAY: 3,
}
"""The step in which a process is started, where it is not there from the beginning."""

UNTIL = {Role.GUARD: 4, Role.CHIEF: 4, Role.DEPUTY: 4, Role.A: 4}
"""The last step in which it is there, where that is not the last of all."""

TO_BE_READ = 4
"""The step from which on B reads what A's disks hold, at the earliest."""

FEWEST, MOST = 4, 12
LONGEST_WAIT, LONGEST_FAULT = 0.8, 2.0
"""Seconds: after a step's beginning or the fault before, and of what passes."""

FATAL_ROUNDS = 0.25
"""The part of the rounds at whose end a QEMU is killed."""


@dataclass(frozen=True)
class Fault:
    """It strikes ``delay`` seconds after the beginning of a step, or the fault before, whichever is later."""

    kind: Kind
    victim: Role | None
    step: int
    delay: float
    lasting: float

    def __str__(self) -> str:
        return f"{self.kind.value} {self.victim.name}" if self.victim else self.kind.value


@dataclass(frozen=True)
class Schedule:
    """A round: what is moved and how, what strikes it, and the command that does the rest after it."""

    setting: Setting
    faults: tuple[Fault, ...]
    rest: str

    @classmethod
    def draw(cls, seed: int, number: int, engine: str, wanted: dict[str, str]) -> Schedule:
        """Return that of one round, which depends on nothing else: ``wanted`` is a value of each, or ``any``.

        QEMU's own copying has one policy. Engine ``any`` is drawn.
        """
        chance = random.Random(f"{seed}/{number}")
        drawn = {name: chance.choice(values) for name, values in CHOICES.items()}
        drawn |= {name: value for name, value in wanted.items() if value != ANY}
        kind_of_engine = chance.choice(("overlay", "overlay", "qemu"))
        engine = kind_of_engine if engine == ANY else engine
        if engine == "qemu":
            drawn["policy"] = "postcopy"
        setting = Setting(engine, **drawn)
        steps = sorted(chance.choice(STEPS) for _ in range(chance.randint(FEWEST, MOST)))
        faults = [_fault(chance, setting, step) for step in steps]
        if chance.random() < FATAL_ROUNDS:
            last = faults[-1]
            faults[-1] = Fault(Kind.KILL, chance.choice(FATAL), last.step, last.delay, 0.0)
        return cls(setting, tuple(faults), chance.choice(("finish", "resume")))


def _fault(chance: random.Random, setting: Setting, step: int) -> Fault:
    kinds = [*[Kind.KILL] * 5, *[Kind.STOP] * 4]
    if step >= TO_BE_READ:
        kinds += [*OF_DISKS, *([*OF_LINK, Kind.DROP, Kind.CUT] if setting.has_link else [])]
    there = [role for role in setting.victims if SINCE.get(role, 0) <= step <= UNTIL.get(role, 6)]
    kind, victim = chance.choice(kinds), None
    if kind is Kind.KILL:
        victim = chance.choice([role for role in there if role not in FATAL])
    elif kind is Kind.STOP:
        victim = chance.choice(there)
    delay, lasting = chance.uniform(0.0, LONGEST_WAIT), chance.uniform(0.2, LONGEST_FAULT)
    return Fault(kind, victim, step, delay, lasting)
