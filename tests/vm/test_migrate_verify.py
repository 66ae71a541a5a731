"""What was copied is compared on both hosts before A's image is given up."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.disks import MIB
from tests.support.processes import check, run, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, monitor, scene


def damage(stage: Scene, offset: int) -> None:
    """Change a byte of B's file behind nbd-overlay's back."""
    with stage.overlay.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def copied(stage: Scene) -> int:
    """A place that has been copied, and that the guest does not write to, as it is zeros on neither host."""
    content, original = stage.overlay.read_bytes(), stage.original
    step = 1 << 16
    for at in range(len(original) - step, 0, -step):
        if content[at : at + step] == original[at : at + step]:
            return at
    return 0


@pytest.mark.representative
def test_a_guest_that_writes_meanwhile_is_verified_without_a_false_alarm(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        with stage.run("--verify", "--json") as going:
            assert going.wait(180.0) == 0, going.output()
        stage.wait_until_guest_works("b")
        told = json.loads(going.output().splitlines()[-1])
        assert told["verified"] + told["written"] == len(stage.original)
        assert told["verified"] > 0
        assert f"{stage.overlay} is verified: " in going.output()
        shown = check(NBD_MIGRATE, "status", "a")
        assert "are as on A, " in shown
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_a_damaged_block_is_found_and_a_is_kept(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=8 * MIB)
        stage.change("log", directory=str(tmp_path))
        with stage.run("--verify", "--name", "vm") as going:
            wait_until(lambda: stage.overlay.exists() and copied(stage), "something is copied", 60.0)
            place = 0

            def is_damaged() -> bool:
                nonlocal place
                place = copied(stage)
                damage(stage, place)
                return bool(place)

            wait_until(is_damaged, "it is damaged", 60.0)
            assert going.wait(180.0) == 1, going.output()
        line = going.output().splitlines()[-1]
        assert f"differ, the first at {place}" in line, line
        assert "A's image and its server are kept" in line
        assert "--no-verify" in line
        assert stage.away.exists()
        assert Role.SERVER.find(tmp_path)
        stage.wait_until_guest_works("b")
        # As it stands in the line.
        done = run(NBD_MIGRATE, "resume", "vm", "--no-verify", seconds=120.0)
        assert done.returncode == 0, done.stderr
        assert not stage.image.exists()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == [place // 512]


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["ORCHESTRATOR", "OVERLAY", "SERVER", "ORCHESTRATOR+OVERLAY"])
def test_what_is_killed_meanwhile_costs_no_false_alarm(tmp_path: Path, victim: str) -> None:
    with scene(tmp_path) as stage:
        stage.change("finish", verify=True)
        victims = [Role[name] for name in victim.split("+")]
        with stage.run_doomed("PROGRESS", *victims, number=signal.SIGKILL) as going:
            code = going.wait(180.0)
        if Role.ORCHESTRATOR in victims:
            done = run(NBD_MIGRATE, "resume", "a", seconds=120.0)
            assert done.returncode == 0, done.stderr
        else:
            assert code == 0, going.output()
        # Where nbd-overlay came to the end alone nobody else has counted.
        assert "bytes are as the source has them" in Path(f"{stage.overlay}.overlay.log").read_text()
        with monitor(stage.monitor_b) as b:
            assert b.state == "running"
        stage.quit_b()
        assert stage.wrong_sectors(interrupted=True) == []


def test_the_engine_that_does_not_know_who_wrote_refuses_by_name(tmp_path: Path) -> None:
    stage = Scene(tmp_path, "qemu")
    done = run(NBD_MIGRATE, "run", stage.plan_file(), "--verify", "--check")
    assert done.returncode == 2
    assert "finish.verify: with destination.engine = 'qemu' B's QEMU copies" in done.stderr
