"""How long the guest needs both hosts: what is only compared with A afterwards is no part of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.migrate.state import Disk, Phase
from recipes.steps import stream as step


@pytest.mark.parametrize(("compared", "window"), [(0.0, 10.0), (7.5, 2.5), (11.0, 0.0)])
def test_the_window_ends_when_every_block_is_on_b(
    monkeypatch: pytest.MonkeyPatch, compared: float, window: float
) -> None:
    entered: dict[Phase, Any] = {}

    class Copied:
        def __init__(self, _: object) -> None: ...

        async def run(self) -> float:
            return compared

    monkeypatch.setattr(step, "Stream", Copied)
    state = SimpleNamespace(disks=(Disk("/a", "/b", 1),), recoveries=0)
    m = SimpleNamespace(state=state, since_arrival=10.0, size=1, disks=(SimpleNamespace(target="/b"),))
    m.enter = lambda phase, **changes: entered.update({phase: changes})
    asyncio.run(step.stream(cast(Any, m)))
    assert entered[Phase.COMPLETE]["window"] == window
