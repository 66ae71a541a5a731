"""Requests that wait: how many threads and how much memory they may have."""

from __future__ import annotations

import functools
import threading

import pytest

from nbdserve.transmission.workers import Budget, InFlight, Pools, Workers
from tests.support.processes import wait_until


def waiting(action: threading.Thread) -> bool:
    """Whether the thread still runs after a moment."""
    action.join(0.1)
    return action.is_alive()


def test_memory_is_granted_as_far_as_it_goes_and_in_the_order_of_arrival() -> None:
    budget = Budget(100)
    budget.reserve(60)
    order: list[str] = []

    def take(name: str, amount: int) -> None:
        budget.reserve(amount)
        order.append(name)

    large = threading.Thread(target=take, args=("large", 90))
    large.start()
    assert waiting(large)
    small = threading.Thread(target=take, args=("small", 10))
    small.start()
    assert waiting(small), "the large one came first"
    budget.release(60)
    large.join(120)
    small.join(120)
    assert order == ["large", "small"]
    assert budget.held == 100


def test_more_than_there_is_is_granted_alone() -> None:
    budget = Budget(100)
    budget.reserve(1)
    huge = threading.Thread(target=budget.reserve, args=(1000,))
    huge.start()
    assert waiting(huge)
    budget.release(1)
    huge.join(120)
    assert budget.held == 1000
    budget.release(1000)
    budget.reserve(100)


def test_one_client_may_have_so_many_requests_and_bytes_in_flight() -> None:
    memory = Budget(1000)
    client = InFlight(3, 100, memory)
    for size in (10, 10, 10):
        client.begin(size)
    fourth = threading.Thread(target=client.begin, args=(10,))
    fourth.start()
    assert waiting(fourth), "three requests"
    client.end(10)
    fourth.join(120)
    client.end(10)
    large = threading.Thread(target=client.begin, args=(90,))
    large.start()
    assert waiting(large), "a hundred bytes"
    client.end(10)
    client.end(10)
    large.join(120)
    assert memory.held == 90
    client.end(90)
    client.begin(500)
    client.end(500)
    assert memory.held == 0
    client.wait_until_none()


def test_tasks_run_in_a_bounded_number_of_threads() -> None:
    workers = Workers(3)
    gate = threading.Event()
    lock = threading.Lock()
    running = done = most = 0

    def task() -> None:
        nonlocal running, done, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(120)
        with lock:
            running -= 1
            done += 1

    for _ in range(10):
        workers.submit(task)
    wait_until(lambda: running == 3, "three run")
    gate.set()
    wait_until(lambda: done == 10, "all have run")
    assert most == 3
    workers.close()


def test_threads_that_nobody_needs_end_and_others_take_their_place() -> None:
    before = threading.active_count()
    workers = Workers(4, idle=0.05)
    done: list[int] = []
    for _ in range(3):
        for number in range(8):
            workers.submit(functools.partial(done.append, number))
        wait_until(lambda: len(done) % 8 == 0 and len(done) > 0, "all have run")
        wait_until(lambda: threading.active_count() <= before, "the threads have ended")
    # Tasks come at the very moment at which threads end.
    for number in range(80):
        workers.submit(functools.partial(done.append, number))
        threading.Event().wait(0.001 * (number % 60))
    wait_until(lambda: len(done) == 104, "none was forgotten")
    workers.close()


def test_tasks_that_were_queued_while_all_were_busy_leave_no_idle_threads_on_the_books() -> None:
    before = threading.active_count()
    workers = Workers(2, idle=0.05)
    for burst in (3, 50, 2, 1):
        gate, done = threading.Event(), threading.Semaphore(0)

        def task(gate: threading.Event = gate, done: threading.Semaphore = done) -> None:
            gate.wait(120)
            done.release()

        for _ in range(burst):
            workers.submit(task)
        gate.set()
        for number in range(burst):
            assert done.acquire(timeout=120), f"task {number} of {burst} waits for threads that have ended"
        wait_until(lambda: threading.active_count() <= before, "the threads have ended")
    workers.close()


def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on threads cannot be started, as when the table of processes is full."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_where_no_thread_can_be_started_the_task_is_done_by_whoever_brings_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workers, places = Workers(2), []

    def task() -> None:
        places.append(threading.current_thread())

    with monkeypatch.context() as patch:
        no_more_threads(patch)
        for _ in range(3):
            workers.submit(task)
        assert places == [threading.current_thread()] * 3
    assert caplog.text.count("no thread can be started") == 1, "one line, not one for each request"
    for _ in range(2):
        workers.submit(task)
    wait_until(lambda: len(places) == 5, "the pool has recovered")
    assert threading.current_thread() not in places[3:]
    workers.close()


def test_a_pool_that_could_not_grow_is_not_smaller_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, gate, running = Workers(3), threading.Event(), threading.Semaphore(0)

    def task() -> None:
        running.release()
        gate.wait(120)

    workers.submit(task)
    assert running.acquire(timeout=120)
    with monkeypatch.context() as patch:
        no_more_threads(patch)
        for _ in range(5):
            workers.submit(task)
    workers.submit(task)
    workers.submit(task)
    for _ in range(2):
        assert running.acquire(timeout=120), "three threads, as before"
    gate.set()
    for _ in range(5):
        assert running.acquire(timeout=120), "every task is done"
    workers.close()


def test_who_waits_in_one_pool_keeps_nobody_waiting_in_another() -> None:
    class Export:
        """Something to have a pool."""

    stuck, free = Export(), Export()
    pools = Pools(2, Budget(100))
    gate, done = threading.Event(), threading.Event()

    def wait() -> None:
        gate.wait(120)

    for _ in range(5):
        pools.of(stuck).near.submit(wait)
    pools.of(free).near.submit(done.set)
    assert done.wait(120)
    gate.set()
    assert pools.of(stuck) is pools.of(stuck)
    pools.close()


def test_who_waits_for_another_server_leaves_threads_and_memory_to_who_does_not() -> None:
    class Export:
        """Something to have a pool."""

    memory, gate, done = Budget(100), threading.Event(), threading.Event()
    pools, export = Pools(2, memory), Export()
    near, far = pools.of(export)

    def wait() -> None:
        gate.wait(120)

    for _ in range(5):
        far.submit(wait)
    near.submit(done.set)
    assert done.wait(120)
    far.memory.reserve(75)
    greedy = threading.Thread(target=far.memory.reserve, args=(10,))
    greedy.start()
    assert waiting(greedy), "three quarters are taken"
    near.memory.reserve(25)
    assert memory.held == 100
    far.memory.release(75)
    greedy.join(120)
    assert (memory.held, far.memory.held) == (35, 10)
    gate.set()
    pools.close()


def test_a_task_that_fails_does_not_take_a_thread_away_from_those_that_follow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    workers = Workers(1)
    done = threading.Event()

    def fail() -> None:
        raise ValueError("a defect")

    workers.submit(fail)
    workers.submit(done.set)
    assert done.wait(120), "the next task waits for a thread that has ended"
    workers.close()
    assert "a defect" in caplog.text
