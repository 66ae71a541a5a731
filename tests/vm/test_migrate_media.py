"""What a guest has besides its disks: media, read-only disks and flash chips are on B, too."""

from __future__ import annotations

import json
import stat
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_bytes
from tests.support.processes import Process, check
from tests.support.vms import NBD_MIGRATE, QEMU, ROOT, Scene, monitor, running

SECONDS = 120.0
FLASH = 64 << 10
BIOS = Path("/usr/share/seabios/bios-256k.bin")


class WithMedia(Scene):
    """A guest with a disk, a CD, an empty drive, and a read-only disk; both hosts are this one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.there = directory / "there"
        self.there.mkdir()
        self.overlay = self.there / "a.raw"
        self.monitor_b = directory / "a.moved.qmp"
        (directory / "b.serial").symlink_to(directory / "a.moved.serial")
        self.cd, self.base, self.data = (directory / name for name in ("x.iso", "base.raw", "data.qcow2"))
        self.code, self.variables = directory / "code.fd", directory / "vars.fd"
        # The BIOS as QEMU has it, in a flash chip; a second one lies below it.
        self.code.write_bytes(BIOS.read_bytes())
        self.variables.write_bytes(random_bytes(FLASH, seed=7))
        self.cd.write_bytes(random_bytes(MIB, seed=5))
        self.base.write_bytes(random_bytes(MIB, seed=6))
        check("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base, self.data)

    def source_qemu(self) -> list[str]:
        """A's command line."""
        node = {"driver": "qcow2", "node-name": "data", "read-only": True}
        file = {"file": {"driver": "file", "filename": str(self.data)}}
        return [
            *QEMU,
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={self.code}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={self.variables}"),
            *("-drive", f"file={self.image},if=none,id=disk,format=raw"),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
            *("-drive", f"file={self.cd},media=cdrom,format=raw,index=2"),
            *("-drive", "if=none,id=empty,media=cdrom", "-device", "ide-cd,drive=empty,bus=ide.1,unit=1"),
            *("-blockdev", json.dumps({**node, **file})),
            *("-device", "virtio-blk-pci,drive=data,id=data"),
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]


def media_of(address: Path) -> set[tuple[str, bool]]:
    """The files that a QEMU has in its drives, and whether they are read-only."""
    with monitor(address) as vm:
        found = [each["inserted"] for each in vm.execute("query-block") if "inserted" in each]
    return {(each["file"], each["ro"]) for each in found}


@pytest.mark.representative
def test_media_and_read_only_disks_are_on_b_as_on_a(tmp_path: Path) -> None:
    stage = WithMedia(tmp_path)
    with running(stage):
        words = ("--source", stage.monitor_a, "--to-dir", stage.there)
        plan = tomllib.loads(check(NBD_MIGRATE, "plan", *words))
        assert plan["destination"]["same"] == [str(stage.cd), str(stage.data), str(stage.base)]
        assert [disk["image"] for disk in plan["disk"]] == [str(stage.image)]
        variables = stage.there / "vars.fd"
        assert plan["flash"] == [{"image": str(stage.variables), "target": str(variables)}]
        before = media_of(stage.monitor_a)
        with Process([str(NBD_MIGRATE), "run", *map(str, words)], tmp_path / "run.log") as moving:
            assert moving.wait(SECONDS) == 0, moving.output()
        stage.wait_until_guest_works("b")
        after = media_of(stage.monitor_b)
        assert {each for each in after if each[1]} == {each for each in before if each[1]}
        assert {each for each in after if not each[1]} == {
            (str(stage.overlay), False),
            (str(variables), False),
        }
        assert variables.read_bytes() == stage.variables.read_bytes()
        assert stat.S_IMODE(variables.stat().st_mode) == 0o600
        stage.quit_b()
        assert stage.wrong_sectors() == []


def test_a_migration_that_is_given_up_leaves_no_file_for_the_flash_chip(tmp_path: Path) -> None:
    stage = WithMedia(tmp_path)
    with running(stage):
        file, variables = tmp_path / "plan.toml", stage.there / "vars.fd"
        check(NBD_MIGRATE, "plan", "--source", stage.monitor_a, "--to-dir", stage.there, "--output", file)
        variables.write_text("mine")
        with Process([str(NBD_MIGRATE), "run", str(file)], tmp_path / "refused.log") as refused:
            assert refused.wait(SECONDS) == 1
        assert f"flash.target: {variables} exists on B; remove it, " in refused.output()
        assert variables.read_text() == "mine"
        variables.unlink()
        argv = [sys.executable, "-m", "tests.support.doomed", str(file), "MIGRATE", "B", "SIGKILL"]
        with Process(argv, tmp_path / "run.log", cwd=ROOT) as run:
            assert run.wait(SECONDS) == 1, run.output()
        assert run.output().splitlines()[-1].endswith("; the guest runs on A as before")
        assert list(stage.there.glob("*.fd")) == []
        stage.wait_until_guest_works("a")
