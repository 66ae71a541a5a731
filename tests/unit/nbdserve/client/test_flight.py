"""When a server has been silent for too long: told by a clock of the test's own."""

from __future__ import annotations

import errno

import pytest

from nbdserve.client.flight import Flight, Request


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def begun(flight: Flight) -> Request[None]:
    """A request that was sent now."""
    request = Request(lambda: None)
    flight.begin(request)
    return request


def test_nothing_is_late_while_bytes_move_however_long_it_takes() -> None:
    clock = Clock()
    flight = Flight(60.0, clock)
    begun(flight)
    for _ in range(1000):
        clock.now += 59.0
        assert 0 < flight.seconds_to_look() <= 5.0
        flight.moved()


def test_silence_for_longer_than_the_limit_is_late_and_told_before() -> None:
    clock = Clock()
    flight = Flight(60.0, clock)
    clock.now += 1000.0  # nobody was asked for anything
    assert flight.quiet == 0.0
    flight.seconds_to_look()
    begun(flight)
    clock.now += 30.0
    begun(flight)
    assert flight.quiet == 30.0
    clock.now += 29.0
    assert flight.seconds_to_look() == pytest.approx(1.0)
    clock.now += 1.0
    with pytest.raises(TimeoutError, match="no answer within 60 s") as late:
        flight.seconds_to_look()
    assert late.value.errno == errno.ETIMEDOUT


def test_requests_that_others_send_do_not_keep_a_silent_server_alive() -> None:
    clock = Clock()
    flight = Flight(10.0, clock)
    begun(flight)
    for _ in range(10):
        clock.now += 1.0
        begun(flight)
    with pytest.raises(TimeoutError):
        flight.seconds_to_look()


def test_a_request_that_is_passed_over_again_and_again_is_late_although_bytes_move() -> None:
    clock = Clock()
    flight = Flight(60.0, clock)
    begun(flight)
    for second in range(62):
        if second < 61:
            flight.seconds_to_look()
        later = begun(flight)
        clock.now += 1.0
        flight.moved()
        flight.end(later)
    with pytest.raises(TimeoutError, match="passed over"):
        flight.seconds_to_look()


def test_a_request_that_is_passed_over_is_found_also_where_answers_come_all_the_time() -> None:
    clock = Clock()
    flight = Flight(60.0, clock)
    begun(flight)
    began = clock.now

    def go_on() -> None:
        while clock.now < began + 120.0:
            later = begun(flight)
            clock.now += 0.01
            flight.moved()
            flight.end(later)
            assert 0 < flight.seconds_to_look() <= 5.0

    with pytest.raises(TimeoutError, match="passed over"):
        go_on()
    assert began + 60.0 <= clock.now <= began + 61.0


def test_silence_after_a_busy_time_is_found_as_soon_as_any() -> None:
    clock = Clock()
    flight = Flight(60.0, clock)
    begun(flight)
    for _ in range(100):
        clock.now += 0.01
        flight.moved()
        assert flight.seconds_to_look() == pytest.approx(5.0)
    clock.now += 58.0
    assert flight.seconds_to_look() == pytest.approx(2.0)
    clock.now += 2.0
    with pytest.raises(TimeoutError, match="no answer"):
        flight.seconds_to_look()


def test_a_long_queue_on_a_slow_link_is_not_taken_for_a_request_that_was_forgotten() -> None:
    """Out of order, and each answer takes a minute: those that were sent before the first was overtaken."""
    clock = Clock()
    flight = Flight(60.0, clock)
    requests = [begun(flight) for _ in range(20)]
    for request in reversed(requests):
        clock.now += 59.0
        flight.moved()
        flight.end(request)
        flight.seconds_to_look()
    assert flight.quiet == 0.0


def test_whatever_goes_wrong_with_an_answer_its_future_ends() -> None:
    def fail() -> None:
        raise MemoryError

    request = Request(fail)
    request.succeed("disk")
    with pytest.raises(OSError, match="disk: its answer could not be taken") as failed:
        request.future.result(0)
    assert failed.value.errno == errno.ENOMEM
