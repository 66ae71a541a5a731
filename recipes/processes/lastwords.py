"""What a process has written last: the line that says why it ended."""

from __future__ import annotations

import re

_FAILED_LOAD = "load of migration failed"
_MOST = 3
"""Lines before QEMU's last one that say what it could not load."""
_PROGRAM = re.compile(r"^qemu-\S+: ")


def last_words(log: str) -> str:
    """Return the last line of a log; where that is QEMU's about a failed load, with the lines that say of
    what.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return ""
    if _FAILED_LOAD not in lines[-1]:
        return lines[-1]
    reasons = [lines[-1]]
    for line in reversed(lines[-1 - _MOST : -1]):
        if not _PROGRAM.match(line) or _FAILED_LOAD in line:
            break
        reasons.append(_PROGRAM.sub("", line))
    return ": ".join(reasons)
