"""Ending a child of ours that does not end by itself.

Only on this machine: what was started on another host is ended there by its supervisor
(processes/supervisor.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

KILL = 3.0
"""Seconds in which a process that was killed must be gone."""


async def end_group(process: asyncio.subprocess.Process) -> None:
    """Kill a child with its session, and wait a moment until it has ended; it may have.

    One with the rights of another user, as sudo has, cannot be killed, and is left.
    """
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL):
            await process.wait()
