"""Starting a child of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from recipes.hosts.interruption import undisturbed
from recipes.hosts.process_group import end_group

Process = asyncio.subprocess.Process


async def spawn(
    argv: Sequence[str], *, abandon: Callable[[Process], Awaitable[None]] = end_group, **options: Any
) -> Process:
    """Start a process, with the options of asyncio.create_subprocess_exec(); OSError when that fails.

    A cancellation waits until it has been started, and ``abandon`` has ended it. Interrupted in the middle,
    asyncio would read the exit status itself, and warn on standard error that somebody has.
    """
    starting = asyncio.create_task(asyncio.create_subprocess_exec(*argv, **options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await undisturbed(_finish(starting, abandon))
        raise


async def _finish(starting: asyncio.Task[Process], abandon: Callable[[Process], Awaitable[None]]) -> None:
    with suppress(OSError):
        process = await starting
        await abandon(process)
