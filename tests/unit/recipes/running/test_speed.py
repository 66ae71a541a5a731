"""What is asked of a run's speed: it is there until the run takes it, and a run that does not is told of."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from recipes.errors import MigrationError
from recipes.migrate.journal import SPEED_ASKED, SPEED_TAKEN
from recipes.running import speed
from recipes.running.speed import Asked, ask, find, in_time, moment, take


@dataclass
class Run:
    """A run that takes what is asked after so many looks, or never, and may end."""

    directory: Path
    takes_after: int = 1 << 30
    ends_after: int = 1 << 30
    looks: int = 0
    taken: list[Asked] = field(default_factory=list)

    def actor(self) -> int:
        return 4711 if self.looks < self.ends_after else 0

    def doing(self) -> str:
        return "step 3, B's QEMU"

    def sleep(self, _: float) -> None:
        self.looks += 1
        if self.looks >= self.takes_after and (asked := find(self.directory)):
            self.taken.append(asked)
            take(self.directory, asked)


def test_it_is_asked_until_it_is_taken(tmp_path: Path) -> None:
    run, asked = Run(tmp_path, takes_after=3), Asked.new(speed=1 << 20)
    ask(tmp_path, asked, run, run.sleep)
    assert run.taken == [asked]
    assert (run.looks, find(tmp_path)) == (3, None)


def test_what_is_asked_while_another_wish_is_taken_is_not_taken_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Asked.new(speed=1), Asked.new(speed=2)

    def put(asked: Asked) -> None:
        (tmp_path / "fresh").write_text(json.dumps(asdict(asked)))
        (tmp_path / "fresh").replace(tmp_path / SPEED_ASKED)

    def overtaken(directory: Path, name: str = SPEED_ASKED) -> Asked | None:
        found = find(directory, name)
        put(second)
        return found

    put(first)
    monkeypatch.setattr(speed, "find", overtaken)
    take(tmp_path, first)
    monkeypatch.undo()
    assert find(tmp_path, SPEED_TAKEN) == first
    assert find(tmp_path) == second
    assert {each.name for each in tmp_path.iterdir()} == {SPEED_ASKED, SPEED_TAKEN}


def test_nothing_is_asked_where_nobody_is_at_work(tmp_path: Path) -> None:
    run = Run(tmp_path / "vm", ends_after=0)
    with pytest.raises(MigrationError, match=r"^nobody is at work on vm, so .* resume vm takes it up$"):
        ask(tmp_path / "vm", Asked.new(speed=1), run, run.sleep)
    assert not (tmp_path / "vm").exists()


def test_a_run_that_does_not_take_it_is_asked_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(MigrationError, match=r"within 30 s, so nothing .* at: step 3, B's QEMU; ask again"):
        ask(tmp_path, Asked.new(speed=1), run, run.sleep)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_asked_no_more_by_who_does_not_wait_any_longer(tmp_path: Path) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, Asked.new(speed=1), Run(tmp_path), interrupted)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_asked_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / SPEED_ASKED).mkdir()
    with pytest.raises(MigrationError, match=rf"{SPEED_ASKED}: Is a directory"):
        ask(tmp_path, Asked.new(speed=1), Run(tmp_path), Run(tmp_path).sleep)
    assert [each.name for each in tmp_path.iterdir()] == [SPEED_ASKED]


def test_a_run_that_ends_is_asked_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, ends_after=5)
    with pytest.raises(MigrationError, match=r"the run has ended before it took this"):
        ask(tmp_path, Asked.new(speed=1), run, run.sleep)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_ask_the_later_one_counts(tmp_path: Path) -> None:
    run, later = Run(tmp_path, takes_after=1), Asked.new(speed=2)

    def sleep(seconds: float) -> None:
        ask(tmp_path, later, run, run.sleep)

    with pytest.raises(MigrationError, match=r"something else was asked meanwhile"):
        ask(tmp_path, Asked.new(speed=1), run, sleep)
    assert run.taken == [later]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"speed": -1}', '{"speed": "x"}', "9" * 100_000, "\0"])
def test_what_is_no_request_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / SPEED_ASKED).write_text(content)
    assert find(tmp_path) is None


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "gone")
    with pytest.raises(MigrationError, match=r"gone/speed\.asked: No such file or directory"):
        ask(tmp_path / "gone", Asked.new(speed=1), run, run.sleep)


def test_a_time_of_the_day_is_the_next_one() -> None:
    now = datetime(2030, 5, 6, 12, 30, 15)
    assert moment("13:00", "--finish-by", now.timestamp()) == datetime(2030, 5, 6, 13, 0).timestamp()
    assert moment("6:05", "--finish-by", now.timestamp()) == datetime(2030, 5, 7, 6, 5).timestamp()
    assert moment("12:30", "--finish-by", now.timestamp()) == datetime(2030, 5, 7, 12, 30).timestamp()
    day = now + timedelta(days=2)
    assert moment(day.isoformat(), "--finish-by", now.timestamp()) == day.timestamp()
    assert moment("2030-05-07T10:00+00:00", "-", now.timestamp()) == pytest.approx(1904378400)


@pytest.mark.parametrize("text", ["", "soon", "25:00", "12:60", "12", "2030-13-01", "-1:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--finish-by '.*' is (no time: write HH:MM|not to come)"):
        moment(text, "--finish-by", time.time())


def test_what_is_over_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--finish-by '2020-01-01' is not to come$"):
        moment("2020-01-01", "--finish-by", time.time())


def test_a_speed_that_ends_in_time_is_a_little_faster_than_it_must_be() -> None:
    assert in_time(100 << 20, 100.0) == pytest.approx(1.05 * (1 << 20), rel=0.001)
    assert in_time(0, 100.0) == speed.LEAST
    assert in_time(100 << 20, 0.0) == 0
    assert in_time(100 << 20, -5.0) == 0
