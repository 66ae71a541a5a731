"""What may hang is looked up once at a time, and waited for only so long."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from nbdserve.exports.lookups import Lookups, TooLateError
from tests.support.processes import wait_until


class Slow:
    """A look-up that waits until ``gate`` opens, and then returns, or raises, ``outcome``."""

    def __init__(self, outcome: str | Exception = "found") -> None:
        self.gate = threading.Event()
        self.begun = 0
        self._outcome = outcome

    def __call__(self) -> str:
        self.begun += 1
        assert self.gate.wait(60), "nobody has opened the gate"
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def asked(pool: ThreadPoolExecutor, lookups: Lookups, look: Slow, times: int) -> list[Future[str]]:
    """So many who ask for one name at once."""
    before = look.begun
    asking = [pool.submit(lookups.get, "a", look) for _ in range(times)]
    wait_until(lambda: look.begun > before, "one of them looks")
    return asking


def test_all_who_ask_meanwhile_share_one_look_and_who_asks_later_has_a_new_one() -> None:
    lookups, look = Lookups(60), Slow()
    with ThreadPoolExecutor(8) as pool:
        asking = asked(pool, lookups, look, 8)
        assert lookups.get("b", lambda: "other") == "other", "nobody else waits"
        wait_until(lambda: pool._work_queue.empty(), "all ask")
        look.gate.set()
        assert [each.result(60) for each in asking] == ["found"] * 8
    begun = look.begun
    assert lookups.get("a", look) == "found"
    assert look.begun == begun + 1


def test_a_failure_is_everybodys_and_is_not_remembered() -> None:
    lookups, look = Lookups(60), Slow(PermissionError("no"))
    with ThreadPoolExecutor(4) as pool:
        asking = asked(pool, lookups, look, 4)
        look.gate.set()
        for each in asking:
            with pytest.raises(PermissionError):
                each.result(60)
    assert lookups.get("a", lambda: "found") == "found"


def test_nobody_waits_for_ever_and_a_look_that_hangs_is_not_made_twice() -> None:
    lookups, look = Lookups(0.05), Slow()
    for _ in range(3):
        with pytest.raises(TooLateError):
            lookups.get("a", look)
    assert look.begun == 1
    look.gate.set()
    wait_until(lambda: not lookups._under_way, "it has come to an end")
    assert lookups.get("a", look) == "found"
    assert look.begun == 2


def test_only_so_many_may_hang() -> None:
    lookups, look = Lookups(0.05, most=2), Slow()
    for name in ("a", "b", "c"):
        with pytest.raises(TooLateError):
            lookups.get(name, look)
    assert look.begun == 2
    look.gate.set()
    wait_until(lambda: not lookups._under_way, "they have come to an end")
    assert lookups.get("c", look) == "found"


def test_without_threads_who_asks_looks_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert Lookups(60).get("a", lambda: "found") == "found"
