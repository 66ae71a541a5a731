"""nbd-migrate run: the six steps, on two real QEMUs and a guest that writes all the time."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Process, check
from tests.support.traps import lay, sprung
from tests.support.vms import NBD_MIGRATE, Role, Scene, scene


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    with scene(tmp_path) as made:
        yield made


@pytest.mark.parametrize("engine", ["qemu", "overlay"])
@pytest.mark.representative
def test_a_guest_and_its_disk_move_while_it_writes(tmp_path: Path, engine: str) -> None:
    with scene(tmp_path, engine) as stage:
        with stage.run() as run:
            assert run.wait(60.0) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.wait_until_only({Role.B})
        assert stage.moved.exists()
        assert not stage.image.exists()
        assert stage.moved.read_bytes()[:512] == stage.original[:512]
        stage.quit_b()
        assert stage.wrong_sectors() == []
        info = json.loads(check("qemu-img", "info", "--output=json", stage.overlay))
        assert info["format"] == ("qed" if engine == "qemu" else "raw")
        assert "backing-filename" not in info


def test_a_migration_goes_on_when_nobody_reads_what_it_prints(stage: Scene) -> None:
    words = shlex.join([str(NBD_MIGRATE), "run", str(stage.plan_file())])
    shell = ["bash", "-o", "pipefail", "-c", f"{words} | head -n 1"]
    with Process(shell, stage.directory / "run.log") as run:
        assert run.wait(60.0) == 0, run.output()
    assert "Traceback" not in run.output()
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.parametrize(
    ("options", "redirected", "code"),
    [
        ("", ">&-", 0),
        ("", "<&- >&- 2>&-", 0),
        ("", ">/dev/full", 0),
        ("--json", ">&-", 0),
        ("--json", ">/dev/full", 1),
        ("--json", "2>/dev/full", 0),
    ],
)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_migration_whose_streams_take_nothing_is_complete_all_the_same(
    stage: Scene, options: str, redirected: str, code: int
) -> None:
    words = shlex.join([str(NBD_MIGRATE), "run", str(stage.plan_file())])
    shell = ["bash", "-c", f"{words} {options} {redirected}"]
    with Process(shell, stage.directory / "run.log") as run:
        assert run.wait(60.0) == code, run.output()
    assert "Traceback" not in run.output()
    if code:
        assert run.output().splitlines()[-1] == (
            "nbd-migrate: the guest has moved to B with its disk, and A is not needed any more; only the "
            "outcome could not be written to standard output: No space left on device"
        )
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_commas_in_paths_are_not_taken_for_options(stage: Scene) -> None:
    stage.overlay = stage.directory / "b,1.raw"
    stage.monitor_b = stage.directory / "b,1.qmp"
    stage.change("destination", qmp=str(stage.monitor_b), image=str(stage.overlay))
    with stage.run() as run:
        assert run.wait(60.0) == 0, run.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_no_process_of_a_migration_runs_what_lies_in_the_current_directory(stage: Scene) -> None:
    traps = lay(stage.directory / "traps")
    with stage.run(cwd=traps) as run:
        assert run.wait(60.0) == 0, run.output()
    stage.wait_until_guest_works("b")
    assert sprung(traps) == ""


@pytest.mark.representative
def test_the_outcome_is_one_json_object(stage: Scene) -> None:
    with stage.run("--json") as run:
        assert run.wait(60.0) == 0
    outcome = json.loads(run.output().splitlines()[-1])
    assert [step["number"] for step in outcome["steps"]] == [1, 2, 3, 4, 5, 6]
    assert outcome["disk_bytes"] == len(stage.original)
    # QEMU counts whole milliseconds, and this guest needs less than one at times.
    assert 0 <= outcome["downtime_ms"] < 1000 * sum(step["seconds"] for step in outcome["steps"])
    assert outcome["recoveries"] == 0
