"""The limits of a migration: on waits, and on what it may take. None is on how long bytes move."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from nbdserve.common.errors import UsageError
from overlay.backing.defaults import CONNECTIONS

MAX_WAIT = 1_000_000
"""The longest wait in seconds, some eleven days."""

MOST = {
    "speed": ((1 << 63) - 1, "bytes per second"),
    "connections": (64, "connections"),
    "restarts": (MAX_WAIT, "restarts"),
    "reconnect_timeout": (86400, "seconds"),
}
"""The largest value of a limit where that is not MAX_WAIT seconds, as QEMU and nbd-overlay have it."""

MAY_BE_ZERO = ("reconnect_delay", "restarts", "speed")
"""The limits that may be 0."""

GONE = {
    "migrate": "the RAM may move for as long as bytes move; limits.silence is for how long none may (60 s)",
    "switch_over": "limits.silence is for how long no byte may move then, too (60 s)",
}
"""Limits that earlier versions had, and what there is in their place."""


@dataclass(frozen=True)
class Limits:
    """The longest waits, in seconds, and what bounds the stream.

    connect          until a monitor or an export accepts a connection
    command          one QMP command
    start            until a process that was started is ready
    silence          sending the RAM, also while the guest stands still, without one byte of progress
    stall            streaming without one byte of progress
    recover          until a guest that waits for the export goes on, once the export is back
    hook             a command of [hooks]
    stop             until a process that was told to end has ended
    reconnect_delay  how long B's QEMU holds a guest's request while the export is away (whole seconds)
    reconnect_timeout  how long nbd-overlay holds what it is asked for while the export is away or silent
    restarts         how often a server that died while streaming is started again (a number)
    connections      that nbd-overlay makes to the export (a number)
    speed            bandwidth of the stream in bytes per second; 0 is no limit
    """

    connect: float = 10.0
    command: float = 15.0
    start: float = 30.0
    silence: float = 60.0
    stall: float = 300.0
    recover: float = 60.0
    hook: float = 60.0
    stop: float = 30.0
    reconnect_delay: int = 10
    reconnect_timeout: float = 60.0
    restarts: int = 5
    connections: int = CONNECTIONS
    speed: int = 0

    def check(self) -> None:
        """Raise UsageError for a negative limit, a wait of no time at all, and what is out of all range."""
        for each in fields(self):
            value = getattr(self, each.name)
            most, unit = MOST.get(each.name, (MAX_WAIT, "seconds"))
            if math.isnan(value):
                raise UsageError(f"limits.{each.name}: nan is not a number of {unit}")
            if value < 0 or (value == 0 and each.name not in MAY_BE_ZERO):
                raise UsageError(f"limits.{each.name}: {value} is too small")
            if value > most:
                raise UsageError(f"limits.{each.name}: {value} is too large: at most {most} {unit}")
