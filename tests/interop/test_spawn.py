"""A process whose start is interrupted: it is ended, and nothing is said about it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from recipes.hosts.process_group import end_group
from recipes.hosts.spawn import spawn
from tests.support.processes import wait_until
from tests.support.vms import lives

STEPS = range(12)
"""More turns of the event loop than the start of a process takes."""


def run(body: Callable[[], Awaitable[None]]) -> None:
    """Run it with the watcher of children that is Python's own from 3.12 on."""

    async def watched() -> None:
        if sys.version_info < (3, 12):
            watcher = asyncio.PidfdChildWatcher()
            watcher.attach_loop(asyncio.get_running_loop())
            asyncio.get_event_loop_policy().set_child_watcher(watcher)
        await body()

    try:
        asyncio.run(watched())
    finally:
        if sys.version_info < (3, 12):
            asyncio.set_event_loop_policy(None)


@pytest.mark.parametrize("command", ["exit", "sleep 60"])
def test_an_interrupted_start_leaves_no_process_and_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    async def body() -> None:
        for steps in STEPS:
            pid_file = tmp_path / str(steps)
            script = f"echo $$ > {pid_file}.new && mv {pid_file}.new {pid_file}; {command}"
            pipe = asyncio.subprocess.PIPE
            starting = asyncio.create_task(
                spawn(["sh", "-c", script], stdout=pipe, stderr=pipe, start_new_session=True)
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            # The process gets further meanwhile, perhaps to its end, and nobody has heard of that.
            time.sleep(0.1)
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled():
                await end_group(starting.result())
            if pid_file.exists():
                pid = int(pid_file.read_text())
                wait_until(lambda pid=pid: not lives(pid), "it has ended")  # type: ignore[misc]

    run(body)
    assert not caplog.records


def test_what_cannot_be_started_is_an_os_error() -> None:
    async def body() -> None:
        with pytest.raises(FileNotFoundError):
            await spawn(["/no/such/program"])

    run(body)
