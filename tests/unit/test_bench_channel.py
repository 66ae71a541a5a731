"""The page of the channel's benchmark: each row has its figures, and is judged by them."""

from __future__ import annotations

import pytest

from tests.bench.channel.page import CHANNEL, LONG, ROWS, SHORT, TWO, Row, section, verdicts
from tests.bench.channel.sample import Sample
from tests.bench.channel.ways import BOTH, IDLE, RAM, Case

_BY_NAME = {row.name: row for row in ROWS}


def sample(rate: float, *latencies: float) -> Sample:
    """What was measured, half of it RAM."""
    return Sample(rate / 2, rate / 2, 1e-9, 2e-9, latencies)


def found(
    row: Row, rates: dict[str, float], loaded: float, idle: float
) -> dict[tuple[str, Case], list[Sample]]:
    """Samples of all cases, by the rate of each contender, and reads with RAM and without."""
    waits = {RAM: loaded, IDLE: idle}
    return {
        (name, case): [sample(rates[name], waits.get(case, loaded))]
        for name in row.contenders
        for case in row.cases
    }


@pytest.mark.parametrize(("rate", "kept"), [(79e6, False), (81e6, True)])
def test_the_channel_is_held_against_two_connections(rate: float, kept: bool) -> None:
    row = _BY_NAME["TCP"]
    measured = {row.name: found(row, {TWO: 100e6, CHANNEL: rate}, 0.002, 0.001)}
    first, *reads = verdicts(row, measured)
    assert first.kept is kept
    assert first.measured == pytest.approx(rate / 100e6)
    assert [each.kept for each in reads] == [True, True]
    text = section(row, measured)
    assert ("MISSED" in text) is not kept
    assert all(case.name in text for case in row.cases)


def test_the_long_wire_is_held_against_the_short_one_where_both_were_measured() -> None:
    short, long = _BY_NAME[SHORT], _BY_NAME[LONG]
    far = found(long, {TWO: 60e6, CHANNEL: 60e6}, 0.201, 0.1)
    near = found(short, {TWO: 100e6, CHANNEL: 100e6}, 0.001, 0.001)
    assert len(list(verdicts(long, {LONG: far}))) == 3
    _, without_trip, *reads = verdicts(long, {LONG: far, SHORT: near})
    assert not without_trip.kept
    assert without_trip.measured == pytest.approx(0.6)
    assert not any(each.kept for each in reads)


def test_over_ssh_only_the_channel_has_reads_to_be_judged() -> None:
    row = _BY_NAME["ssh"]
    name = next(iter(row.contenders))
    measured = {row.name: found(row, {name: 100e6, CHANNEL: 90e6}, 0.001, 0.001)}
    del measured[row.name][name, IDLE]
    assert [each.kept for each in verdicts(row, measured)] == [True, True]
    assert len(measured[row.name][CHANNEL, BOTH]) == 1
