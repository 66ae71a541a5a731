"""How fast a stream may be: what an operator asks of a run, and the speed that ends it in time.

The run finds what is asked when it looks how far it is, and takes it when it has written it down (asking.py).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.sizes import format_size
from recipes.migrate.decoding import decoded
from recipes.migrate.journal import SPEED_ASKED, SPEED_TAKEN
from recipes.migrate.runtime import Migration
from recipes.migrate.state import LATEST, State
from recipes.plans.limits import MOST
from recipes.running import asking
from recipes.running.asking import Known

ANSWER = 30.0
"""Seconds in which a run takes what is asked of it; some of its steps look at nothing for a while."""

LEAST = 1 << 16
"""Bytes per second below which no end in time is worth it."""

HURRY = 1.05
"""How much faster than it must be a stream is that is to end in time: a guest's own requests come first."""

WISH = asking.Wish(SPEED_ASKED, SPEED_TAKEN)


@dataclass(frozen=True)
class Asked:
    """What is asked: at most ``speed`` bytes per second, where 0 is no limit, or the end by ``finish_by``.

    finish_by  seconds since the epoch; 0: whenever it comes
    mark       tells it from what is asked later
    """

    speed: int
    finish_by: float
    mark: str

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= MOST["speed"][0] or not 0 <= self.finish_by < LATEST:
            raise ValueError(f"{self.speed}, {self.finish_by}")

    @classmethod
    def new(cls, *, speed: int = 0, finish_by: float = 0.0) -> Asked:
        """Return one of our own."""
        return cls(speed, finish_by, os.urandom(8).hex())


def find(directory: Path, name: str = SPEED_ASKED) -> Asked | None:
    """Return what is asked of the migration in this directory; None where nothing is, or nothing readable."""
    try:
        return decoded(Asked, json.loads(asking.text(directory, name)))
    except (ValueError, RecursionError):
        return None


def write_down(m: Migration) -> Asked | None:
    """Return what is asked of a running migration, once the journal has it; None where nothing is."""
    asked = find(m.journal.directory)
    if asked is None:
        return None
    limits = replace(m.plan.limits, speed=asked.speed)
    m.record(plan=replace(m.plan, limits=limits), finish_by=asked.finish_by)
    m.report.note(f"the stream's speed was changed: {described(asked.speed, asked.finish_by)}")
    return asked


def described(speed: int, finish_by: float) -> str:
    """Return what a stream may take, for the operator."""
    if finish_by:
        then = datetime.fromtimestamp(finish_by).isoformat(" ", "minutes")
        return f"as much as it needs to end by {then}"
    return f"at most {format_size(speed)} per second" if speed else "no limit"


def take(directory: Path, asked: Asked) -> bool:
    """Say that this was done; what was asked in the same instant is asked still.

    Returns False where it was asked no more: who did has been told that nothing is changed.
    """
    return asking.take(directory, WISH, asked.mark, lambda name: find(directory, name) == asked)


def take_back(m: Migration, before: State) -> None:
    """Write down that all is as it was before something that is asked no more."""
    limits = replace(m.plan.limits, speed=before.plan.limits.speed)
    m.record(plan=replace(m.plan, limits=limits), finish_by=before.finish_by)
    m.report.note("that was withdrawn: the stream's speed is as it was before")


def ask(
    directory: Path,
    asked: Asked,
    known: Known,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Ask it, and wait until it was taken.

    Raises MigrationError when nobody is at work, or does not take it: then it is asked no more.
    """
    asking.ask(directory, WISH, json.dumps(asdict(asked)), known, ANSWER, sleep, tell)


def moment(text: str, option: str, now: float) -> float:
    """Return the seconds since the epoch of ``HH:MM``, the next time that it is so late here, or of an ISO
    date with a time.

    Raises UsageError, with the option's name, for anything else, and for what is over.
    """
    try:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", text):
            hour, minute = map(int, text.split(":"))
            today = datetime.fromtimestamp(now)
            then = today.replace(hour=hour, minute=minute, second=0, microsecond=0)
            if then <= today:
                then += timedelta(days=1)
        else:
            then = datetime.fromisoformat(text)
        seconds = then.timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"{option} {text!r} is no time: write HH:MM, or a date as in 2030-01-31T06:00"
        ) from error
    if not now < seconds < LATEST:
        raise UsageError(f"{option} {text!r} is not to come")
    return seconds


def in_time(missing: int, seconds: float) -> int:
    """Return the bytes per second at which so many are moved in time; 0, no limit, when that is over."""
    return max(LEAST, int(missing / seconds * HURRY)) if seconds > 0 else 0
