"""What the operator sees of a migration."""

from __future__ import annotations

import dataclasses
import io
import json
import os

import pytest

from recipes.migrate.console import Board, JsonReport, PlainReport, TerminalReport, describe, describe_ram
from recipes.migrate.progress import Moment, Outcome, Progress, RamProgress, Report, Step, StepResult

MIB = 1 << 20
HALFWAY = Progress(done=512 * MIB, total=1024 * MIB, rate=64.0 * MIB, window=9.6, left=8.0)
RESULT = StepResult(Step.STREAM, 16.04, "every block is local")
OUTCOME = Outcome(
    steps=(RESULT,),
    downtime_ms=12,
    migrate_ms=700,
    ram_bytes=1 << 27,
    disk_bytes=1 << 30,
    window=16.3,
    recoveries=1,
)


def tell(report: Report) -> None:
    """Everything that a report is told, once."""
    report.step_started(Step.STREAM)
    report.moment(Moment.ARRIVED)
    report.progress(HALFWAY)
    report.note("the export is back")
    report.step_done(RESULT)
    report.finished(OUTCOME)


def test_without_a_terminal_there_are_plain_lines() -> None:
    out = io.StringIO()
    tell(PlainReport(out))
    lines = [line.split(" s  ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "step 5  stream the disk ...",
        "        the guest runs on B",
        "        512 of 1024 MiB  64.0 MiB/s  8 s left  window 10 s",
        "        the export is back",
        "step 5  every block is local [16.0 s]",
        "done: downtime 12 ms, 1024 MiB of disk on B, vulnerable window 16.3 s, interrupted 1 times",
    ]


def test_progress_is_not_a_line_every_time() -> None:
    out = io.StringIO()
    report = PlainReport(out)
    for _ in range(10):
        report.progress(HALFWAY)
    assert len(out.getvalue().splitlines()) == 1


def test_on_a_terminal_lines_and_bar_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    report = TerminalReport(out)
    tell(report)
    report.close()
    assert "512 of 1024 MiB  64.0 MiB/s  8 s left  window 10 s" in out.getvalue()
    assert "\n" in out.getvalue().split("the export is back")[1]


def test_a_terminal_that_hangs_up_stops_no_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with open(theirs, "w") as out:
        report = TerminalReport(out)
        report.progress(HALFWAY)
        report.ram(RamProgress(MIB, MIB, 1.0, 1))
        os.close(ours)
        report.ram(RamProgress(MIB, MIB, 1.0, 1))
        tell(report)
        report.close()


def test_the_outcome_as_json_is_all_that_standard_output_gets(capsys: pytest.CaptureFixture[str]) -> None:
    tell(JsonReport())
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == [
        {"number": 5, "title": "stream the disk", "seconds": 16.04, "summary": "every block is local"}
    ]
    assert json.loads(captured.out)["recoveries"] == 1
    assert "the export is back" in captured.err


def test_nothing_is_said_about_the_end_of_a_stream_that_stands_still() -> None:
    assert "0.0 MiB/s  -- left" in describe(Progress(0, MIB, 0.0, 1.0))


def test_a_stream_is_told_with_what_a_is_needed_for_where_that_is_known() -> None:
    assert "needed" not in describe(HALFWAY)
    line = describe(dataclasses.replace(HALFWAY, needed=515 * MIB))
    assert line == "512 of 1024 MiB  64.0 MiB/s  8 s left  window 10 s  A needed for 515.0 MiB"


def test_the_ram_is_told_with_what_is_to_go_and_how_often_it_began_anew() -> None:
    ram = RamProgress(sent=100 * MIB, missing=20 * MIB, rate=8.0 * MIB, rounds=1)
    assert describe_ram(ram) == "RAM: 100 MiB sent, 20 MiB to go  8.0 MiB/s"
    assert describe_ram(dataclasses.replace(ram, rounds=3)).endswith("  round 3")


def test_the_ram_has_no_line_where_it_takes_a_moment_and_none_in_the_place_of_the_stream_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("recipes.migrate.console.time.monotonic", lambda: clock[0])
    out, ram = io.StringIO(), RamProgress(sent=100 * MIB, missing=20 * MIB, rate=8.0 * MIB, rounds=1)
    report = PlainReport(out)
    for _ in range(9):
        report.ram(ram)
        clock[0] += 0.5
    assert out.getvalue() == ""
    for _ in range(12):
        report.ram(ram)
        clock[0] += 0.5
    assert out.getvalue().count("RAM: 100 MiB sent") == 2
    report.progress(HALFWAY)
    assert out.getvalue().count("512 of 1024 MiB") == 1


def test_a_board_shows_the_latest_in_one_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with Board(out) as board:
        board.show("vm: [bold] step 5", HALFWAY)
        board.show("vm: step 6", None)
    text = out.getvalue()
    assert "vm: [bold] step 5" in text
    assert "━" in text
    # The cursor goes up before the second one.
    assert "\x1b[1A" in text.split("step 5")[1]


def test_a_board_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Board(None) as board:
        board.show("vm: step 5", HALFWAY)
        board.show("vm: step 6", None)
    assert capsys.readouterr().out == "vm: step 5\nvm: step 6\n"
