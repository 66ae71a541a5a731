"""Holes stay holes on the way, and what a guest discards on B goes out of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.disks import MIB
from tests.support.many_disks import ManyDisks
from tests.support.processes import wait_until
from tests.support.vms import Monitor, monitor, running

SECONDS = 60.0
SIZE = 64 * MIB
DATA = range(16 * MIB, 24 * MIB)
"""All that the second disk has, but for the guest's records in its second MiB."""
DISCARDED_EARLY = range(16 * MIB, 18 * MIB)
DISCARDED_LATE = range(20 * MIB, 22 * MIB)


def make_sparse(stage: ManyDisks) -> bytearray:
    """Have little on the second disk, before the guest is started; return what."""
    content = bytearray(SIZE)
    content[DATA.start : DATA.stop] = b"\xdb" * len(DATA)
    stage.disks[1].image.unlink()
    with stage.disks[1].image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(DATA.start)
        file.write(content[DATA.start : DATA.stop])
    return content


def discard(b: Monitor, place: range) -> None:
    """Have QEMU discard as its guest does, at the device."""
    [device] = [
        each["qdev"]
        for each in b.execute("query-block")
        if each.get("inserted", {}).get("node-name") == "disk1"
    ]
    line = f'qemu-io -d {device} "discard {place.start} {len(place)}"'
    assert b.execute("human-monitor-command", command_line=line) == ""


def allocated(image: Path) -> int:
    """How many bytes of the disk the file has."""
    return image.stat().st_blocks * 512


@pytest.mark.representative
def test_holes_stay_holes_and_what_the_guest_discards_is_given_back(tmp_path: Path) -> None:
    stage = ManyDisks(tmp_path, sizes=(8 * MIB, SIZE))
    content = make_sparse(stage)
    stage.change("limits", speed=4 * MIB)
    target = stage.disks[1].target
    with running(stage):
        with stage.run() as run:
            run.wait_for_line("the guest runs on B")
            with monitor(stage.second_b) as b:
                discard(b, DISCARDED_EARLY)
            assert run.wait(SECONDS) == 0, run.output()
        records = MIB
        assert allocated(target) <= len(DATA) - len(DISCARDED_EARLY) + records
        with monitor(stage.second_b) as b:
            discard(b, DISCARDED_LATE)
        left = len(DATA) - len(DISCARDED_EARLY) - len(DISCARDED_LATE) + records
        wait_until(lambda: allocated(target) <= left, "the file has given it back")
        for place in (DISCARDED_EARLY, DISCARDED_LATE):
            content[place.start : place.stop] = bytes(len(place))
        stage.disks[1] = replace(stage.disks[1], original=bytes(content))
        assert stage.verdict(stage.stop_b()) == []
