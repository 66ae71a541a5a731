"""How a migration went is kept in a file that stays small, and that a later command goes on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recipes.migrate.journal import SAMPLES
from recipes.running.samples import MOST, Sample, Samples, load


def sample(time: float) -> Sample:
    """One at a time."""
    return Sample(time, int(time) * 1000, 1 << 40, 1000.25, int(time), time / 8)


def test_what_is_noted_is_there(tmp_path: Path) -> None:
    samples, noted = Samples(tmp_path), [sample(1e9 + each) for each in range(10)]
    for each in noted:
        samples.note(each)
    assert load(tmp_path) == noted


def test_of_what_comes_often_enough_is_kept(tmp_path: Path) -> None:
    samples = Samples(tmp_path)
    for each in range(100):
        samples.note(sample(1000 + each / 10))
    assert [each.time for each in load(tmp_path)] == [1000.0 + each for each in range(10)]


def test_the_file_stays_small_and_keeps_the_beginning_and_the_end(tmp_path: Path) -> None:
    samples, end = Samples(tmp_path), 40 * MOST
    for each in range(end):
        samples.note(sample(1e9 + each))
    kept = [each.time - 1e9 for each in load(tmp_path)]
    assert MOST // 2 <= len(kept) <= MOST
    assert kept[0] == 0
    assert end - kept[-1] <= 2 * (kept[1] - kept[0])
    assert kept == sorted(set(kept))
    assert (tmp_path / SAMPLES).stat().st_size < 100 * MOST


def test_a_later_command_goes_on_and_takes_no_more_than_the_one_before(tmp_path: Path) -> None:
    for command in range(4):
        samples = Samples(tmp_path)
        for each in range(MOST):
            samples.note(sample(1e9 + command * MOST + each))
    assert MOST // 2 <= len(load(tmp_path)) <= MOST


@pytest.mark.parametrize(
    "damage", [b"", b"[1,2", b"{}\n", b"\xff\n", b'["a",1,2,3,4,5]\n', b"[1e999]\n", b"9\n"]
)
def test_what_is_none_is_left_out(damage: bytes, tmp_path: Path) -> None:
    whole = sample(5)
    Samples(tmp_path).note(whole)
    with open(tmp_path / SAMPLES, "ab") as file:
        file.write(damage)
    assert load(tmp_path) == [whole]
    later = sample(9)
    with open(tmp_path / SAMPLES, "ab") as file:
        file.write(b"\n")
    Samples(tmp_path).note(later)
    assert load(tmp_path)[-1] == later


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).mkdir()
    Samples(tmp_path).note(sample(1))
    assert load(tmp_path) == []
    assert load(tmp_path / "gone") == []


def test_what_is_no_file_of_ours_is_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SAMPLES)
    assert load(tmp_path) == []
    Samples(tmp_path).note(Sample(1.0, 0, 1, 0.0))
