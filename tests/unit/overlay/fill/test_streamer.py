"""How much the stream asks for at a time beside a guest that reads."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from overlay.backing.reads import LONGEST
from overlay.fill.fetch import Fetched
from overlay.fill.pacing import QUIET_STEP, RateLimit, Window
from overlay.fill.streamer import Streamer


def streamer(fetched: Fetched) -> Streamer:
    """One whose link takes everything, and whose guest's misses are these."""
    made = Streamer.__new__(Streamer)
    made._fetcher = cast(Any, SimpleNamespace(fetched=fetched, claims=SimpleNamespace(unit=64 << 10)))
    made._sources = cast(Any, SimpleNamespace(length=LONGEST, room=None))
    made.limit, made.window = RateLimit(), Window()
    return made


@pytest.mark.parametrize(("since", "waits"), [(0.001, True), (0.010, False)])
def test_a_guest_that_reads_now_and_then_is_made_way_for_and_not_the_time_between(
    monkeypatch: pytest.MonkeyPatch, since: float, waits: bool
) -> None:
    """One that misses something 50 times a second leaves most of that second to the stream."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    made = streamer(Fetched(waited_until=100.0 - since))
    assert made._step() == (QUIET_STEP if waits else LONGEST)
    assert made._room() == (made.window.quiet_size if waits else made.window.size)


def test_while_a_guest_waits_little_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    made = streamer(Fetched(waiting=1))
    assert made._step() == QUIET_STEP
    assert made._room() == made.window.quiet_size


@pytest.mark.parametrize("is_here", [False, True])
def test_what_has_become_absent_waits_a_moment_unless_the_guest_is_here(
    monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    """Until then its guest may be standing still elsewhere."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    made = streamer(Fetched())
    made._news, made._is_due = threading.Event(), lambda: is_here
    made._image, made._job = cast(Any, None), cast(Any, SimpleNamespace(pause_point=lambda: None))
    made.look_again()
    made._wait_for_news()
    assert bool(slept) == (not is_here)
    assert not made._news.is_set()
