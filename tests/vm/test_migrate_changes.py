"""What somebody else changes on A on the way: the guest stays there, and a line says what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import check, run, wait_until
from tests.support.vms import NBD_MIGRATE, Scene, monitor, running

SECONDS = 120.0
USB = ("-device", "qemu-xhci,id=usb", "-device", "usb-kbd,id=kbd")
exhaustive = pytest.mark.exhaustive

Words = tuple[str | Path, ...]


class Changing(Scene):
    """A guest with a keyboard, whose QEMU has a second monitor: one serves one client at a time."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.change("destination", qemu=(*self.plan.destination.qemu, *USB))

    @property
    def second_a(self) -> Path:
        return self.directory / "second.qmp"

    def source_qemu(self) -> list[str]:
        return [*super().source_qemu(), *USB, "-qmp", f"unix:{self.second_a},server=on,wait=off"]

    def qmp(self, command: str, **given: object) -> Words:
        """A command for A's QEMU."""
        named = {key.replace("_", "-"): value for key, value in given.items()}
        return (NBD_MIGRATE, "qmp", self.second_a, command, json.dumps(named))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Changing]:
    made = Changing(tmp_path)
    with running(made):
        yield made


def plug(stage: Changing) -> Words:
    return stage.qmp("device_add", driver="usb-mouse", id="mouse", bus="usb.0")


def mirror(stage: Changing) -> Words:
    """A job that never ends by itself."""
    other = str(stage.directory / "elsewhere.raw")
    return stage.qmp("drive-mirror", job_id="backup", device="disk0", target=other, sync="full", format="raw")


CHANGES: dict[str, tuple[Callable[[Changing], Words], str]] = {
    "a new device": (plug, "the guest's devices have changed since step 1: mouse (usb-mouse) has come, and"),
    "a device that has gone": (
        lambda stage: stage.qmp("device_del", id="kbd"),
        "the guest's devices have changed since step 1: kbd (usb-kbd) has gone, and",
    ),
    "a new disk": (
        lambda stage: stage.qmp("device_add", driver="usb-storage", id="stick", bus="usb.0", drive="new"),
        "the guest's devices have changed since step 1: stick (usb-storage) has come, and",
    ),
    "a job": (mirror, "a job is at work in A's QEMU: backup (mirror); wait until it has ended, or cancel it"),
    "another file": (
        lambda stage: ("sh", "-c", 'cp "$1" "$1.new" && mv "$1.new" "$1"', "sh", stage.image),
        "a.raw on A is another file: give the one that A's QEMU has open its name back",
    ),
    "no file": (
        lambda stage: ("mv", stage.image, f"{stage.image}.away"),
        "a.raw on A any more: give",
    ),
    "a longer one": (
        lambda stage: ("truncate", "-s", "+64K", stage.image),
        f"a.raw on A has {(64 << 20) + (64 << 10)} bytes and had {64 << 20}, of which A's QEMU knows nothing",
    ),
    "a shorter one": (
        lambda stage: ("truncate", "-s", "-512", stage.image),
        f"a.raw on A has {(64 << 20) - 512} bytes and had {64 << 20}, of which A's QEMU knows nothing",
    ),
}
OFTEN = ("a new device",)


@pytest.mark.representative
@pytest.mark.parametrize(
    "change", [each if each in OFTEN else pytest.param(each, marks=exhaustive) for each in CHANGES]
)
def test_a_change_before_the_ram_moves_ends_the_migration_with_the_guest_on_a(
    stage: Changing, change: str
) -> None:
    making, words = CHANGES[change]
    if change == "a new disk":
        (stage.directory / "new.raw").write_bytes(bytes(1 << 20))
        file = {"driver": "file", "filename": str(stage.directory / "new.raw")}
        check(*stage.qmp("blockdev-add", driver="raw", node_name="new", file=file))
    stage.change("hooks", before_cutover=tuple(str(word) for word in making(stage)))
    with stage.run() as going:
        assert going.wait(SECONDS) == 1, going.output()
    last = going.output().splitlines()[-1]
    assert words in last, last
    assert last.endswith("; the guest runs on A as before")
    with monitor(stage.monitor_a) as a:
        assert a.state == "running"


@pytest.mark.representative
@pytest.mark.parametrize("change", ["a job", pytest.param("another file", marks=exhaustive)])
def test_a_change_while_the_ram_moves_is_noticed_while_the_guest_stands_still(
    stage: Changing, change: str
) -> None:
    making, words = CHANGES[change]
    check(*stage.qmp("migrate-set-parameters", max_bandwidth=32 << 10))
    with stage.run() as going:
        going.wait_for_line("step 4  migrate", SECONDS)

        def moves() -> bool:
            told = run(*stage.qmp("query-migrate"), seconds=SECONDS).stdout
            return '"active"' in told

        wait_until(moves, "the RAM moves", SECONDS)
        check(*making(stage), seconds=SECONDS)
        check(*stage.qmp("migrate-set-parameters", max_bandwidth=1 << 30))
        assert going.wait(SECONDS) == 1, going.output()
    assert "the guest stands still on A" in going.output(), "it was under way"
    last = going.output().splitlines()[-1]
    assert words in last, last
    assert last.endswith("; the guest runs on A as before")
    stage.wait_until_guest_works("a")


def test_a_job_that_is_there_before_is_told_of_before_anything_starts(stage: Changing) -> None:
    check(*mirror(stage))
    done = run(NBD_MIGRATE, "run", stage.plan_file(), seconds=SECONDS)
    assert done.returncode == 1
    assert CHANGES["a job"][1] in done.stderr
    assert not stage.started()
