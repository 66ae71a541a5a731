"""A guest that writes while its disk follows it, of which B has an older copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.disks import MIB
from tests.support.processes import check, run, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, scene

BLOCK = 1 << 16


def older(stage: Scene, size: int | None = None) -> Path:
    """A copy of the disk from before the guest ran, of which the last quarter is another one's."""
    copy = bytearray(stage.original)
    for at in range(len(copy) * 3 // 4, len(copy), BLOCK):
        copy[at] ^= 1
    path = stage.directory / "yesterday"
    path.write_bytes(copy[:size])
    return path


@pytest.mark.representative
def test_what_b_has_already_is_not_sent_and_what_the_guest_writes_is_kept(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        seed = older(stage, len(stage.original) - 5)
        with stage.run("--seed", str(seed), "--json") as done:
            assert done.wait(120.0) == 0, done.output()
        assert f"{seed} has 67108859 bytes, the disk 67108864" in done.output()
        stage.wait_until_guest_works("b")
        told = json.loads(done.output().splitlines()[-1])
        # The guest has written to most of the rest on A.
        assert 0 < told["seeded"] <= len(stage.original) * 3 // 4
        assert "of it from its seed" in check(NBD_MIGRATE, "status", "a")
        report = stage.directory / "report.html"
        check(NBD_MIGRATE, "report", "a", "--output", report)
        assert "which was not sent" in report.read_text()
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.parametrize("moment", ["PROGRESS", pytest.param("SHUTDOWN", marks=pytest.mark.exhaustive)])
def test_what_was_spared_and_compared_is_told_also_where_the_command_was_killed(
    tmp_path: Path, moment: str
) -> None:
    """Before nbd-overlay has come to the end, which it does alone then, or when that was written down."""
    with scene(tmp_path) as stage:
        stage.change("destination", seed=str(older(stage)))
        stage.change("finish", verify=True)
        with stage.run_doomed(moment, Role.ORCHESTRATOR) as going:
            going.wait(120.0)
        wait_until(lambda: not Path(f"{stage.overlay}.map").exists(), "everything is there", 120.0)
        check(NBD_MIGRATE, "resume", "a", seconds=120.0)
        told = json.loads(check(NBD_MIGRATE, "status", "a", "--json"))
        [disk] = told["disks"]
        assert 0 < disk["seeded"] <= len(stage.original) * 3 // 4
        assert disk["verified"] > 0
        assert disk["verified"] + disk["written"] == len(stage.original)
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.exhaustive
@pytest.mark.representative
def test_a_seed_that_goes_away_does_not_keep_the_guest_from_going_on(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        seed = older(stage)
        stage.change("destination", seed=str(seed))
        stage.change("limits", speed=8 * MIB)
        with stage.run() as going:
            going.wait_for_line(" of 64 MiB", 60.0)
            seed.unlink()
            for process in Role.OVERLAY.find(stage.directory):
                process.kill()
            assert going.wait(120.0) == 0, going.output()
        assert f"the seed {seed} on B is there no more; what is missing is copied" in going.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors(interrupted=True) == []


def test_a_seed_that_is_of_no_use_is_told_of_before_anything_starts(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:

        def complaint(seed: Path) -> str:
            done = run(NBD_MIGRATE, "run", stage.plan_file(), "--seed", seed, seconds=60.0)
            assert done.returncode == 1
            return done.stderr.splitlines()[-1]

        image = stage.directory / "seed.qcow2"
        check("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
        assert f"destination.seed: {image} looks like a qcow2 image; a seed must be raw" in complaint(image)
        assert "is not there on B; name another copy" in complaint(stage.directory / "no such file")
        assert "is neither a file nor a block device on B" in complaint(stage.directory)
        assert not stage.started()
