"""Interruptions by a signal: how they become a cancellation, and what must not be left half done by one.

What an interruption means for a migration is no matter of this module: the step that is under way is
cancelled, and commands/run.py (``go_through``) then does what it does after a failure (commands/retreat.py).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Do the work; SIGINT, SIGTERM and SIGHUP cancel it, also where the shell has us ignore them.

    Raises CancelledError when one of them did. Afterwards the signals do what they did before.
    """
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def like_ctrl_c() -> Iterator[None]:
    """Within this SIGTERM, and SIGHUP unless it is ignored, raise KeyboardInterrupt, as SIGINT does.

    For what waits without asyncio, and has to take something back. In the main thread only.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """Finish the work even if we are cancelled, again, in the middle of it: that is forgotten."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()


async def completed(work: Awaitable[T]) -> T:
    """Finish the work even if we are cancelled in the middle of it.

    Then raises what the work has raised, so that no error is lost, or else that CancelledError.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await undisturbed(asyncio.wait({task}))
        task.result()
        raise


async def together(work: Sequence[Awaitable[T]]) -> list[T]:
    """Wait for all of these; then raise the first failure, if there is one."""
    ends = await asyncio.gather(*work, return_exceptions=True)
    found: list[T] = []
    for end in ends:
        if isinstance(end, BaseException):
            raise end
        found.append(end)
    return found
