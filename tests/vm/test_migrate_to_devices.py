"""A guest's disk moves to a block device on B: nothing is made beside that, and nothing is left on it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overlay.formats.device.map_place import name_of
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Export
from tests.support.disks import MIB, random_disk
from tests.support.loops import loop_device
from tests.support.processes import check, wait_until
from tests.support.servers import UnixAddress
from tests.support.vms import DISK_SIZE, NBD_MIGRATE, Role, Scene, monitor, running

SECONDS = 120.0
SLOW = 12 << 20


class ToDevice(Scene):
    """A guest whose disk moves to a device that is so many bytes larger, and not empty."""

    def __init__(self, directory: Path, device: Path, before: bytes) -> None:
        super().__init__(directory)
        self.device, self.before = device, before
        self.state = directory / "state"
        self.put(self.image)

    def put(self, image: Path, **more: Any) -> None:
        """The disk on A is this."""
        self.image = image
        target, state = str(self.device), str(self.state)
        planned = PlannedDisk(str(image), target, "disk0", "disk0", state=state, **more)
        self.change_all(planned)

    def change_all(self, planned: PlannedDisk) -> None:
        """Let the plan have this disk."""
        plan = self.plan
        self.plan = type(plan)(
            type(plan.source)(qmp=plan.source.qmp),
            plan.export,
            type(plan.destination)(
                qemu=plan.destination.qemu,
                qmp=plan.destination.qmp,
                migration=plan.destination.migration,
                policy=plan.destination.policy,
                overwrite=(planned.target,),
            ),
            limits=plan.limits,
            disk=(planned,),
        )

    @property
    def left_beside(self) -> list[str]:
        """What lies beside the device, or among what belongs to it and is no log."""
        beside = list(self.device.parent.glob(f"{self.device.name}.*"))
        return [each.name for each in (*beside, *self.state.glob("*")) if each.suffix != ".log"]

    def wrong_sectors(self, *, interrupted: bool = False) -> list[int]:
        """As of a file; what lies behind the disk must be as before."""
        content = self.device.read_bytes()
        assert content[DISK_SIZE:] == self.before[DISK_SIZE:]
        self.overlay = self.directory / "copy-of-device.raw"
        self.overlay.write_bytes(content[:DISK_SIZE])
        return super().wrong_sectors(interrupted=interrupted)


@contextmanager
def to_device(directory: Path, room: int) -> Iterator[ToDevice]:
    """The scene, whose guest does not run yet."""
    before = random_disk(directory / "b.file", DISK_SIZE + room)
    with loop_device(directory / "b.file") as device:
        yield ToDevice(directory, device, before)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ToDevice]:
    """The guest runs on A, and its disk is to move to a larger device, not too fast."""
    with to_device(tmp_path, 3 * MIB + 512) as made:
        made.change("limits", speed=SLOW)
        with running(made):
            yield made


def size_on_b(stage: ToDevice) -> int:
    """How large the guest's disk is to B's QEMU."""
    with monitor(stage.monitor_b) as b:
        nodes = b.execute("query-named-block-nodes", flat=True)
        return int(next(each["image"]["virtual-size"] for each in nodes if each["node-name"] == "disk0"))


@pytest.mark.representative
def test_a_disk_moves_to_a_larger_device_though_nbd_overlay_is_killed(stage: ToDevice) -> None:
    with stage.run() as run:
        run.wait_for_line("step 5  stream", SECONDS)
        run.wait_for_line(" of 64 MiB", SECONDS)
        [overlay] = Role.OVERLAY.find(stage.directory)
        overlay.kill()
        assert run.wait(SECONDS) == 0, run.output()
    assert f"{stage.device} on B: what is on it is overwritten" in run.output()
    assert f"{stage.device} on B is 3 MiB larger than the disk" in run.output()
    assert f"with size={DISK_SIZE} on the raw node" in run.output()
    stage.wait_until_guest_works("b")
    assert size_on_b(stage) == DISK_SIZE
    stage.wait_until_only({Role.B})
    assert stage.left_beside == []
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_a_guest_moves_on_from_a_device_that_is_larger_than_its_disk(stage: ToDevice) -> None:
    stage.change("limits", speed=0)
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    stage.wait_until_guest_works("b")
    plan, there = stage.plan, stage.directory / "c"
    there.mkdir()
    qemu = [word.replace("b.serial", "c/b.serial") for word in plan.destination.qemu]
    stage.plan = replace(
        plan,
        source=replace(plan.source, qmp=str(stage.monitor_b), image=str(stage.device)),
        export=Export(UnixAddress(there / "nbd").uri("vm")),
        destination=replace(
            plan.destination,
            qemu=tuple(qemu),
            qmp=str(there / "b.qmp"),
            image=str(there / "b.raw"),
            node="disk0",
            migration=f"unix:{there}/migration",
        ),
        disk=(),
    )
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert (there / "b.raw").stat().st_size == DISK_SIZE
    stage.monitor_b, stage.overlay = there / "b.qmp", there / "b.raw"
    assert size_on_b(stage) == DISK_SIZE
    stage.quit_b()
    assert Scene.wrong_sectors(stage) == []


@pytest.mark.representative
def test_before_the_cut_over_the_device_stays_as_it_is(stage: ToDevice) -> None:
    stage.change(
        "destination",
        qemu=tuple(w.replace("rerror=stop", "rerror=report") for w in stage.plan.destination.qemu),
    )
    with stage.run() as run:
        assert run.wait(SECONDS) == 1
    assert "rerror=report" in run.output()
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert stage.device.read_bytes() == stage.before
    assert stage.left_beside == []
    stage.wait_until_guest_works("a")
    found = (NBD_MIGRATE, "plan", "--source", stage.monitor_a, "--target", stage.device)
    plan = check(*found, "--overwrite", stage.device)
    assert f'target = "{stage.device}" # a block device, which becomes the disk' in plan
    assert f'overwrite = ["{stage.device}"] # what is on it is lost' in plan
    assert f"{stage.device}.monitor" not in plan


@pytest.mark.parametrize("moment", ["LAUNCH", "MIGRATE"])
def test_a_killed_run_leaves_nothing_on_the_device(stage: ToDevice, moment: str) -> None:
    with stage.run_doomed(moment, Role.ORCHESTRATOR) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the guest's way back", SECONDS)
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert stage.device.read_bytes() == stage.before
    assert stage.left_beside == []
    stage.wait_until_guest_works("a")


def test_a_killed_run_is_finished_on_the_device(stage: ToDevice) -> None:
    with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR, Role.OVERLAY) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
    done = check(NBD_MIGRATE, "finish", stage.plan_file(), seconds=SECONDS)
    assert f"the guest's disk is {stage.device} on B" in done
    stage.wait_until_guest_works("b")
    assert size_on_b(stage) == DISK_SIZE
    stage.quit_b()
    assert stage.wrong_sectors() == []
    assert stage.left_beside == []


@pytest.mark.parametrize("policy", ["postcopy", "hybrid"])
def test_a_device_moves_to_a_device_of_its_size(tmp_path: Path, policy: str) -> None:
    with to_device(tmp_path, 0) as stage, loop_device(stage.image) as source:
        stage.put(source)
        stage.change("destination", policy=policy)
        try:
            with running(stage):
                with stage.run() as run:
                    assert run.wait(SECONDS) == 0, run.output()
                stage.wait_until_guest_works("b")
                assert size_on_b(stage) == DISK_SIZE
                stage.quit_b()
                assert stage.wrong_sectors() == []
                assert stage.left_beside == []
        finally:
            shutil.rmtree(Path("/var/lib/nbd-migrate") / name_of(str(source)), ignore_errors=True)


def test_a_qcow2_image_moves_to_a_device(tmp_path: Path) -> None:
    with to_device(tmp_path, MIB) as stage:
        image = tmp_path / "a.qcow2"
        check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", stage.image, image)

        class Qcow2(ToDevice):
            def source_qemu(self) -> list[str]:
                return [word.replace("driver=raw", "driver=qcow2") for word in super().source_qemu()]

        stage.__class__ = Qcow2
        stage.put(image, format="qcow2")
        with running(stage):
            with stage.run() as run:
                assert run.wait(SECONDS) == 0, run.output()
            stage.wait_until_guest_works("b")
            stage.quit_b()
            assert stage.wrong_sectors() == []
            assert stage.left_beside == []
