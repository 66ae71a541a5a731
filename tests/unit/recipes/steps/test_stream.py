"""The end of a stream that fails: what else was under way is ended with it, and says nothing of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.plans.limits import Limits
from recipes.steps.stream import Stream


def test_what_was_under_way_for_a_complete_disk_ends_with_the_stream_and_says_nothing(
    tmp_path: Path,
) -> None:
    complaints: list[dict[str, Any]] = []
    ended: list[str] = []

    async def settle(*, fails: bool) -> None:
        if fails:
            raise MigrationError("B's QEMU has ended")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("it was cancelled")

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        plan = SimpleNamespace(limits=Limits())
        state, journal = SimpleNamespace(finish_by=0.0), SimpleNamespace(directory=tmp_path)
        m = SimpleNamespace(plan=plan, disks=(), state=state, journal=journal, b=None)
        stream = Stream(cast(Migration, m))

        async def fail() -> None:
            stream._settling |= {asyncio.create_task(settle(fails=fails)) for fails in (True, False)}
            await asyncio.sleep(0)
            raise MigrationError("the stream failed")

        stream._stream = fail  # type: ignore[method-assign]
        stream._jobs.find = lambda **_: asyncio.sleep(0)  # type: ignore[method-assign]
        with contextlib.suppress(MigrationError):
            await stream.run()
            pytest.fail("it has not failed")
        assert ended == ["it was cancelled"]

    asyncio.run(run())
    gc.collect()
    assert complaints == []
