"""Counting requests and their latencies."""

from __future__ import annotations

from nbdserve.protocol.constants import Command
from nbdserve.transmission.traffic import BUCKETS, Histogram, Traffic


def test_a_latency_goes_to_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram()
    for bound in BUCKETS:
        histogram.observe(bound)
    assert histogram.counts == [1] * len(BUCKETS) + [0]
    histogram.observe(BUCKETS[-1] * 1.001, 5)
    histogram.observe(0.0)
    assert histogram.counts[-1] == 5
    assert histogram.counts[0] == 2
    assert abs(histogram.seconds - sum(BUCKETS) - 5 * BUCKETS[-1] * 1.001) < 1e-9


def test_totals_are_what_the_parts_have_counted() -> None:
    total = Traffic()
    for number in (1, 2, 3):
        part = Traffic(timed=True)
        part.requests[Command.READ] += number
        part.bytes[Command.WRITE] += 10 * number
        part.failed(Command.TRIM)
        part.failed(99)
        part.took(Command.READ, 0.02, number)
        part.took(99, 0.02)
        total.add(part)
    assert total.requests[Command.READ] == 6
    assert total.bytes[Command.WRITE] == 60
    assert total.errors[Command.TRIM] == 3
    assert sum(total.errors) == 3
    ((command, histogram),) = total.latencies()
    assert (command, sum(histogram.counts)) == (Command.READ, 6)
