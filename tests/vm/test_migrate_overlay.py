"""nbd-migrate run with nbd-overlay: what dies on the way, and what becomes of the guest and of its disk."""

from __future__ import annotations

import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pasting import after, pasted_well
from tests.support.processes import Process, check, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, monitor, running, scene

SECONDS = 40.0
OVERLAY_ENDED = r"nbd-overlay on B (was ended by signal 9|ended, as its supervisor was killed)"
"""A supervisor on a busy host may be taken for a dead one."""
"""More than any of these migrations takes, with its failure, even on a busy machine."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A, and a plan in which nbd-overlay moves its disk, not too fast."""
    with scene(tmp_path) as made:
        made.change("limits", speed=32 << 20)
        yield made


def files_of_overlay(stage: Scene) -> list[str]:
    """What there is on B of the disk and beside it, but logs and process ids."""
    return sorted(path.name for path in stage.directory.glob("b.raw*") if path.suffix not in (".log", ".pid"))


def assert_as_before(stage: Scene) -> None:
    """Nothing is left of the migration, and the guest works on A."""
    wait_until(lambda: not stage.started(), "everything that was started has ended", 10.0)
    assert files_of_overlay(stage) == []
    stage.wait_until_guest_works("a")


def assert_complete(stage: Scene) -> None:
    """The guest works on B, with nothing but its file."""
    stage.wait_until_only({Role.B})
    stage.wait_until_guest_works("b")
    with monitor(stage.monitor_b) as b:
        nodes = b.execute("query-named-block-nodes", flat=True)
    assert {each["drv"] for each in nodes} == {"raw", "file"}
    stage.quit_b()
    assert stage.wrong_sectors() == []
    assert files_of_overlay(stage) == ["b.raw"]


@pytest.mark.parametrize("moment", ["LAUNCH", "MIGRATE"])
@pytest.mark.parametrize("victim", [Role.ORCHESTRATOR, Role.SERVER])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_before_the_cut_over_the_guest_stays_on_a(stage: Scene, moment: str, victim: Role) -> None:
    with stage.run_doomed(moment, victim) as run:
        assert run.wait(SECONDS) == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the guest's way back", 10.0)
    assert_as_before(stage)


def test_the_guest_stays_on_a_when_nbd_overlay_dies_before_it_was_needed(stage: Scene) -> None:
    with stage.run_doomed("MIGRATE", Role.OVERLAY) as run:
        assert run.wait(SECONDS) == 1
    assert re.search(OVERLAY_ENDED, run.output().splitlines()[-1])
    assert_as_before(stage)


def test_nbd_overlay_that_dies_at_the_switch_over_is_started_again_or_the_guest_stays_on_a(
    stage: Scene,
) -> None:
    with stage.run_doomed("SWITCHOVER", Role.OVERLAY) as run:
        status = run.wait(SECONDS)
    if status == 0:
        assert_complete(stage)
    else:
        # Its death was known before the guest was let go.
        assert re.search(OVERLAY_ENDED, run.output().splitlines()[-1])
        assert_as_before(stage)


# At the second, nobody has been told of its end when its monitor is looked for.
@pytest.mark.parametrize("moment", ["ARRIVED", "STREAM"])
def test_nbd_overlay_that_dies_when_the_guest_arrives_is_started_again(stage: Scene, moment: str) -> None:
    with stage.run_doomed(moment, Role.OVERLAY) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert "nbd-overlay has ended; it is started again, and the guest waits" in run.output()
    assert "interrupted 0 times" not in run.output().splitlines()[-1]
    assert_complete(stage)


@pytest.mark.parametrize("victim", [Role.SERVER, Role.OVERLAY, Role.SUPERVISOR_OF_OVERLAY])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_the_stream_goes_on_when_what_feeds_it_dies(stage: Scene, victim: Role) -> None:
    with stage.run_doomed("PROGRESS", victim) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert ("it is started again" in run.output()) == (victim is Role.OVERLAY)
    assert_complete(stage)


def test_a_failure_behind_the_stream_does_not_say_that_the_source_is_needed(stage: Scene) -> None:
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB")
        stage.moved.write_text("mine")
        assert run.wait(SECONDS) == 1
    last = run.output().splitlines()[-1]
    assert f"could not be moved to {stage.moved}; the guest is on B and stays there; its disk" in last
    assert "is complete and needs nothing on A; to clear away what is left: " in last
    assert stage.moved.read_text() == "mine"
    stage.wait_until_guest_works("b")
    stage.moved.unlink()
    pasted_well(after("to clear away what is left", last))
    assert stage.started() == {Role.B}
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_what_is_in_the_place_of_the_disk_or_of_its_sockets_is_not_touched(stage: Scene) -> None:
    for name in ("b.raw", "b.raw.map", "b.raw.nbd", "b.raw.qmp"):
        path = stage.directory / name
        path.write_text("mine")
        with stage.run() as run:
            assert run.wait(SECONDS) == 1
        assert f"{path} exists on B; remove it" in run.output()
        assert path.read_text() == "mine"
        path.unlink()


def test_the_guest_survives_on_b_when_the_orchestrator_is_killed_while_the_disk_is_streamed(
    stage: Scene,
) -> None:
    with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B, Role.SERVER, Role.OVERLAY, Role.FENCE})


class Opened(Scene):
    """A guest whose QEMU on A goes past the page cache, and unmaps zeros."""

    def source_qemu(self) -> list[str]:
        """A's command line."""
        more = "discard=unmap,detect-zeroes=unmap,file.discard=unmap,file.cache.direct=on,file.aio=native"
        return [f"{each},{more}" if each.startswith("driver=raw") else each for each in super().source_qemu()]


def test_in_the_end_the_disk_is_opened_as_it_was_on_a(tmp_path: Path) -> None:
    stage, there = Opened(tmp_path), tmp_path / "there"
    there.mkdir()
    with running(stage):
        text = check(NBD_MIGRATE, "plan", "--source", stage.monitor_a, "--to-dir", there)
        plan = tmp_path / "found.toml"
        plan.write_text(text)
        with Process([str(NBD_MIGRATE), "run", str(plan)], tmp_path / "run.log") as run:
            assert run.wait(90.0) == 0, run.output()
        assert "B's QEMU cannot open" not in run.output()
        with monitor(Path(tomllib.loads(text)["destination"]["qmp"])) as b:
            nodes = {each["node-name"]: each for each in b.execute("query-named-block-nodes", flat=True)}
    assert nodes["disk0-local"]["cache"] == {"writeback": True, "direct": True, "no-flush": False}
    assert nodes["disk0"]["detect_zeroes"] == "unmap"


@pytest.mark.representative
def test_an_overlay_that_dies_just_before_the_pivot_is_started_again(stage: Scene) -> None:
    """QEMU flushes to it before it parts from it."""
    with stage.run_doomed("SHUTDOWN", Role.OVERLAY) as run:
        assert run.wait(60.0) == 0, run.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []
