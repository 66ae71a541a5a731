"""Guests that were started in different ways are found out, and moved without a plan's file."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.many_disks import ManyDisks
from tests.support.pasting import after, pasted_well
from tests.support.processes import Process, run, wait_until
from tests.support.vms import NBD_MIGRATE, QEMU, Role, Scene, monitor, running

BY_HAND = tuple(word for word in QEMU if word != "-nodefaults")


class Found(Scene):
    """A guest whose QEMU was started in a way of its own; B is this machine, too."""

    def __init__(self, directory: Path, *words: str) -> None:
        super().__init__(directory)
        self.words = words
        self.target = directory / "there"
        self.target.mkdir()
        self.overlay = self.target / "a.raw"
        self.monitor_b = directory / "a.moved.qmp"
        (directory / "b.serial").symlink_to(directory / "a.moved.serial")

    def source_qemu(self) -> list[str]:
        """A's command line."""
        return [
            *self.words,
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]

    @property
    def pid(self) -> str:
        """A's QEMU."""
        [process] = Role.A.find(self.directory)
        return str(process.pid)

    def plan_of(self, source: str) -> str:
        """What ``nbd-migrate plan`` prints."""
        done = run(NBD_MIGRATE, "plan", "--source", source, "--to-dir", self.target)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_found(self, source: str, *options: str) -> Process:
        """``nbd-migrate run`` without a plan's file."""
        argv = [str(NBD_MIGRATE), "run", "--source", source, "--to-dir", str(self.target), *options]
        return Process(argv, self.directory / "run.log")


class FoundWithThree(ManyDisks):
    """A guest whose three disks were each started in another way."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.there = directory / "there"
        self.there.mkdir()
        self.disks = [
            dataclasses.replace(disk, target=self.there / disk.image.name, moved=disk.image)
            for disk in self.disks
        ]
        self.monitor_b = directory / "a.moved.qmp"
        (directory / "b.serial").symlink_to(directory / "a.moved.serial")

    def source_qemu(self) -> list[str]:
        """A's command line; the BIOS numbers the disk without a bootindex last."""
        first, second, third = (disk.image for disk in self.disks)
        return [
            *QEMU,
            *("-drive", f"file={third},if=virtio,format=raw", "-device", "virtio-scsi-pci"),
            *("-blockdev", f"driver=raw,node-name=first,file.driver=file,file.filename={first}"),
            *("-device", json.dumps({"driver": "virtio-blk-pci", "drive": "first", "bootindex": 0})),
            *("-drive", f"file={second},if=none,id=second,format=raw"),
            *("-device", "scsi-hd,drive=second,bootindex=1"),
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]


def with_config(directory: Path) -> tuple[str, ...]:
    """The guest's disk, machine and memory in a file that -readconfig reads."""
    file = directory / "vm.cfg"
    file.write_text(
        f"""
# as qemu-system's own documentation has them
[machine]
  type = "q35"
[memory]
  size = "16M"
[drive "disk"]
  file = "{directory / "a.raw"}"
  format = "raw"
  if = "none"
[device "virtio-disk"]
  driver = "virtio-blk-pci"
  drive = "disk"
  bus = "pcie.0"
  addr = "0x7"
"""
    )
    return (
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-readconfig",
        str(file),
    )


def started(way: str, directory: Path) -> tuple[str, ...]:
    """A's command line, but for its console and its monitor."""
    image = directory / "a.raw"
    node = {"driver": "raw", "node-name": "of-more-than-twenty-letters", "file": "file0"}
    file = {"driver": "file", "node-name": "file0", "filename": str(image)}
    device = {"driver": "virtio-blk-pci", "drive": node["node-name"], "id": "disk", "bus": "pci.0"}
    return {
        "-drive if=virtio": (*QEMU, "-drive", f"file={image},if=virtio,format=raw,cache=writethrough"),
        "-hda": (*BY_HAND, "-hda", str(image), "-monitor", "stdio"),
        "JSON": (
            *QEMU,
            *("-blockdev", json.dumps(file), "-blockdev", json.dumps(node), "-device", json.dumps(device)),
            *("-device", "virtio-rng-pci"),
        ),
        "-readconfig": with_config(directory),
        "q35 -hda": (*BY_HAND[:-1], "q35", "-hda", str(image)),
        "scsi": (
            *QEMU,
            *("-device", "virtio-scsi-pci,id=scsi0", "-drive", f"file={image},if=none,id=d,format=raw"),
            *("-device", "scsi-hd,bus=scsi0.0,drive=d,serial=a,,b", "-drive", "if=none,id=cd,media=cdrom"),
            *("-device", "scsi-cd,bus=scsi0.0,drive=cd", "-device", "virtio-rng-pci"),
        ),
    }[way]


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Found]:
    """A guest that runs on A, started in one of these ways."""
    with guest(tmp_path, request.param) as made:
        yield made


@contextmanager
def guest(directory: Path, way: str) -> Iterator[Found]:
    """The same as a block."""
    made = Found(directory, *started(way, directory))
    with running(made):
        yield made


@pytest.mark.parametrize(
    "stage",
    [
        "-drive if=virtio",
        "JSON",
        "-readconfig",
        "scsi",
        "-hda",
        "q35 -hda",
    ],
    indirect=True,
)
@pytest.mark.representative
@pytest.mark.sampled(2)
def test_a_guest_moves_without_a_plan_however_it_was_started(stage: Found) -> None:
    plan = stage.plan_of(str(stage.monitor_a))
    assert tomllib.loads(plan)["source"]["qmp"] == str(stage.monitor_a)
    assert tomllib.loads(stage.plan_of(stage.pid)) == tomllib.loads(plan)
    file = stage.directory / "found.toml"
    file.write_text(plan)
    assert run(NBD_MIGRATE, "run", "--check", file).returncode == 0
    with stage.run_found(stage.pid) as moving:
        assert moving.wait(60.0) == 0, moving.output()
    stage.wait_until_guest_works("b")
    with monitor(stage.monitor_b) as b:
        [disk] = [each for each in b.execute("query-block") if "inserted" in each]
        assert disk["inserted"]["file"] == str(stage.overlay)
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_all_disks_of_a_guest_are_found_and_move_together(tmp_path: Path) -> None:
    stage = FoundWithThree(tmp_path)
    with running(stage):
        argv = [str(NBD_MIGRATE), "run", "--source", str(stage.monitor_a), "--to-dir", str(stage.there)]
        with Process(argv, tmp_path / "run.log") as moving:
            assert moving.wait(60.0) == 0, moving.output()
        stage.assert_moved()


@pytest.mark.parametrize("stage", ["-drive if=virtio"], indirect=True)
def test_what_hinders_is_told_in_one_line_and_nothing_is_touched(stage: Found) -> None:
    def refused(*words: str | Path) -> str:
        done = run(NBD_MIGRATE, *words)
        assert done.returncode in (1, 2), done.stdout
        assert done.stdout == ""
        [line] = done.stderr.splitlines()
        return line

    plan = ("plan", "--source", stage.monitor_a)
    # B is this machine, where the image is A's.
    assert "is the disk's own file on A, as B sees it too: give --to-dir DIR" in refused(*plan)
    file = stage.directory / "kept.toml"
    file.write_text("mine")
    assert f"{file} exists; remove it" in refused(*plan, "--to-dir", stage.target, "--output", file)
    assert file.read_text() == "mine"
    assert "--source QMP|PID (see nbd-migrate run --help)" in refused("run")
    assert "--to-dir is for a guest that is to be looked at" in refused("run", file, "--to-dir", "/x")
    with monitor(stage.monitor_a) as a:
        told = f"{stage.monitor_a} is its only monitor, and another client is connected; end that"
        assert told in refused("plan", "--source", stage.pid)
        assert told in refused("run", "--source", stage.monitor_a, "--to-dir", stage.target)
        a.execute("stop")
    assert "it does not run, it is in state paused; start it first (cont)" in refused(*plan)
    with monitor(stage.monitor_a) as a:
        a.execute("cont")
        a.execute("device_add", driver="virtio-rng-pci", id="late")
    assert "the device late was plugged in while it ran; unplug it (device_del)" in refused(*plan)
    with monitor(stage.monitor_a) as a:
        a.execute("device_del", id="late")
        a.execute("human-monitor-command", command_line="block_set_io_throttle virtio0 0 0 0 100000 0 0")
    assert "is throttled (iops=100000)" in refused(*plan)
    assert list(stage.target.iterdir()) == []
    stage.wait_until_guest_works("a")


@pytest.mark.parametrize("stage", ["JSON"], indirect=True)
@pytest.mark.representative
def test_a_plan_that_was_written_runs_as_its_first_lines_say(stage: Found) -> None:
    file = stage.directory / "plan.toml"
    done = run(NBD_MIGRATE, "plan", "--source", stage.pid, "--to-dir", stage.target, "--output", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Process([NBD_MIGRATE, "run", file], stage.directory / "run.log") as moving:
        assert moving.wait(60.0) == 0, moving.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.parametrize("stage", ["-drive if=virtio"], indirect=True)
@pytest.mark.parametrize("aside", [True, False])
def test_the_same_guest_moves_there_and_back(stage: Found, aside: bool) -> None:
    """Where its old image has stayed that is in the way, until it is removed as the refusal says."""
    back, elsewhere = stage.directory, stage.directory / "moved.raw"
    options = ["--move-aside", str(elsewhere)] if aside else []
    with stage.run_found(str(stage.monitor_a), *options) as moving:
        assert moving.wait(60.0) == 0, moving.output()
    stage.wait_until_guest_works("b")
    before = stage.dots("a")
    argv = [str(NBD_MIGRATE), "run", "--source", str(stage.monitor_b), "--to-dir", str(back)]
    if not aside:
        done = run(*argv, seconds=60.0)
        assert done.returncode == 1, done
        assert f"{stage.image}: its guest went to" in done.stderr
        pasted_well(after("this image is out of date; where nobody needs it", done.stderr))
    with Process(argv, stage.directory / "back.log") as moving:
        assert moving.wait(60.0) == 0, moving.output()
    wait_until(lambda: stage.dots("a") > before + 2, "the guest works on A again", 15.0)
    with monitor(stage.monitor_a) as a:
        assert a.state == "running"
        a.execute("quit")
    wait_until(lambda: not Role.B.find(stage.directory), "its QEMU ends")
    stage.overlay = stage.image
    assert stage.wrong_sectors() == []
