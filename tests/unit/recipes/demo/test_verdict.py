"""The demo's verdict: it holds only when everything that it rests on does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.demo.disk import Comparison, Original
from recipes.demo.guest import Memory
from recipes.demo.records import cells_on, newest
from recipes.demo.run import Witness
from recipes.demo.stage import Stage
from recipes.demo.verdict import Phases, Verdict
from recipes.migrate.progress import Report, Step, StepResult

CELLS = cells_on(64 << 20)
LIVE = len(newest(480, CELLS))
GOOD = Verdict(
    Memory(written=480, live=LIVE, bad=0, complaint=""),
    Phases(before=160, cut_over=192, streamed=320, verified=480),
    Comparison(compared=60 << 20, excepted=4 << 20, different=0, first=None),
    (),
    CELLS,
)
BAD = {
    "1 of the guest's records are not what it wrote; first: record 7": replace(
        GOOD, memory=replace(GOOD.memory, bad=1, complaint="first: record 7")
    ),
    f"the guest re-read {LIVE - 1} records": replace(GOOD, memory=replace(GOOD.memory, live=LIVE - 1)),
    "did not go on where it was": replace(GOOD, phases=replace(GOOD.phases, streamed=176)),
    "did not go on where it was: Phases(before=0": replace(GOOD, phases=replace(GOOD.phases, before=0)),
    "verified=320": replace(GOOD, phases=replace(GOOD.phases, verified=320)),
    "the first at byte 4711": replace(GOOD, comparison=replace(GOOD.comparison, different=1, first=4711)),
    "the source's QEMU still runs": replace(GOOD, leftovers=("the source's QEMU still runs",)),
}


def test_the_verdict_holds_when_guest_and_host_found_nothing_wrong_and_nothing_is_left() -> None:
    assert GOOD.holds
    assert list(GOOD.lines())[-1] == "verdict  the disk is complete and correct"


@pytest.mark.parametrize("reason", BAD)
def test_the_verdict_fails_and_says_why(reason: str) -> None:
    verdict = BAD[reason]
    assert not verdict.holds
    assert any(reason in failure for failure in verdict.failures)
    text = "\n".join(verdict.lines())
    assert reason in text
    assert text.endswith("verdict  the migration FAILED")


def test_a_guest_that_announced_nothing_on_b_before_the_stream_ended_has_not_fallen_back(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.console").write_text("")
    stage = Stage(tmp_path, tmp_path, Original(1 << 20), tmp_path)
    witness = Witness(stage, Report())
    witness.before, witness.cut_over = 16, 32
    witness.step_done(StepResult(Step.STREAM, 0.1, ""))
    assert witness.phases(64).in_order


def test_every_record_that_still_counts_belongs_to_one_phase() -> None:
    counts = GOOD.phases.live(CELLS)
    assert sum(counts) == LIVE
    assert all(counts)
