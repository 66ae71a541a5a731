"""nbd-migrate run: the six steps, on two real QEMUs and a guest that writes all the time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import check
from tests.support.vms import Role, Scene, scene


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    with scene(tmp_path) as made:
        yield made


def test_a_guest_and_its_disk_move_while_it_writes(stage: Scene) -> None:
    with stage.run() as run:
        assert run.wait(60.0) == 0, run.output()
    stage.wait_until_guest_works("b")
    assert stage.started() == {Role.B}
    assert stage.moved.exists()
    assert not stage.image.exists()
    assert stage.moved.read_bytes()[:512] == stage.original[:512]
    stage.quit_b()
    assert stage.wrong_sectors() == []
    info = json.loads(check("qemu-img", "info", "--output=json", stage.overlay))
    assert "backing-filename" not in info


def test_the_outcome_is_one_json_object(stage: Scene) -> None:
    with stage.run("--json") as run:
        assert run.wait(60.0) == 0
    outcome = json.loads(run.output().splitlines()[-1])
    assert [step["number"] for step in outcome["steps"]] == [1, 2, 3, 4, 5, 6]
    assert outcome["disk_bytes"] == len(stage.original)
    assert outcome["downtime_ms"] > 0
    assert outcome["recoveries"] == 0
