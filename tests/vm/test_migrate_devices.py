"""A guest whose disk on A is a block device moves to a file on B, and leaves nothing among the devices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.formats.device.map_place import name_of
from tests.support.loops import loop_device
from tests.support.vms import Role, Scene, running

STATE = Path("/var/lib/nbd-migrate")


@pytest.fixture(params=["by its name", "through a link"])
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The guest, on a loop device; its name may be a link in a directory of its own, as a volume's is."""
    made = Scene(tmp_path)
    with loop_device(made.image) as device:
        disk = device
        if request.param == "through a link":
            disk = tmp_path / "vg" / "lv"
            disk.parent.mkdir()
            disk.symlink_to(device)
        made.image = disk
        made.change("source", image=str(disk))
        made.change("finish", move_aside="")
        try:
            with running(made):
                yield made
        finally:
            shutil.rmtree(STATE / name_of(str(disk)), ignore_errors=True)


@pytest.mark.representative
def test_no_logs_and_process_ids_land_among_the_devices(stage: Scene) -> None:
    stage.change("limits", speed=32 << 20)
    place = STATE / name_of(str(stage.image))
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB")
        pid = int((place / f"{stage.image.name}.nbdserve.pid").read_text())
        assert [process.pid for process in Role.SERVER.find(stage.directory)] == [pid]
        assert run.wait(60.0) == 0, run.output()
    stage.wait_until_guest_works("b")
    names = sorted(path.name for path in place.iterdir())
    assert names == [f"{stage.image.name}.{what}" for what in ("fence.log", "moved.json", "nbdserve.log")]
    for path in (stage.image, stage.image.resolve()):
        assert list(path.parent.glob(f"{path.name}.*")) == []
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_a_device_is_not_moved_aside_nor_taken_for_the_destination(stage: Scene) -> None:
    stage.change("finish", move_aside=str(stage.moved))
    with stage.run() as run:
        assert run.wait(30.0) == 1
    assert f"finish.move_aside: {stage.image} is a block device on A, which stays" in run.output()
    stage.change("finish", move_aside="")
    link = stage.directory / "b.raw"
    link.symlink_to(stage.image)
    with stage.run() as run:
        assert run.wait(30.0) == 1
    assert f"destination.image: {link} is a block device on B; name it by its path below /dev" in run.output()
    link.unlink()
    stage.wait_until_guest_works("a")
