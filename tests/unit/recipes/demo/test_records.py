"""The demo's records: every place is used in its turn, and the guest's shell and the host agree on them."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.common.errors import UsageError
from recipes.demo.initramfs import BUSYBOX, INIT
from recipes.demo.records import CLUSTER, ORIGIN, SHAPES, cells_on, disk_of, extents, newest, place

MIB = 1 << 20
SIZES = [MIB, 64 * MIB, 256 * MIB, 1024 * MIB, 3 * MIB + 512]


def first_turn(cells: int) -> list[int]:
    """The numbers of the first turn that stand for themselves; the others take an earlier record's place."""
    return [number for number in range(1, cells + 1) if number % 8]


@pytest.mark.parametrize("size", SIZES)
def test_the_guests_program_puts_every_record_where_the_host_looks_for_it(size: int) -> None:
    cells = cells_on(size)
    loop = "for n in $(seq 1 3000); do place $n; echo $cell $first $count; done"
    script = f". {INIT}; disks=1 cells0={cells}; {loop}"
    done = subprocess.run(
        [BUSYBOX, "sh", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    places = [place(number, cells) for number in range(1, 3001)]
    assert done.stdout.split("\n")[:-1] == [f"{each.cell} {each.first} {each.count}" for each in places]


def test_the_guests_program_knows_on_which_of_its_disks_a_record_is() -> None:
    cells = [cells_on(size * MIB) for size in (64, 16, 32)]
    known = " ".join(f"cells{number}={each} device{number}=vd{number}" for number, each in enumerate(cells))
    script = (
        f". {INIT}; disks=3 {known}; for n in $(seq 1 3000); do place $n; echo $device $first $count; done"
    )
    done = subprocess.run(
        [BUSYBOX, "sh", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    found = [(disk_of(number, 3), place(number, cells[disk_of(number, 3)])) for number in range(1, 3001)]
    assert done.stdout.split("\n")[:-1] == [f"vd{disk} {each.first} {each.count}" for disk, each in found]
    for disk in range(3):
        used = {each for on, each in found if on == disk}
        assert newest(3000, cells[disk], disk, 3).keys() == used


@pytest.mark.parametrize("size", SIZES)
def test_no_place_comes_back_before_every_place_had_its_turn(size: int) -> None:
    cells = cells_on(size)
    used = [place(number, cells).cell for number in first_turn(cells)]
    assert len(set(used)) == len(used)


def test_every_eighth_record_takes_the_place_of_the_record_with_half_its_number() -> None:
    cells = cells_on(256 * MIB)
    for number in range(8, 1000, 16):
        assert place(number, cells) == place(number // 2, cells)


@given(size=st.integers(2, 4096).map(lambda mib: mib * MIB), written=st.integers(0, 3000))
def test_records_lie_on_the_disk_and_do_not_touch_each_other(size: int, written: int) -> None:
    try:
        cells = cells_on(size)
    except UsageError:
        return
    end = 0
    for offset, length in extents(written, cells):
        assert offset >= end
        end = offset + length
    assert end <= size


def test_the_newest_record_of_a_place_is_the_one_that_counts() -> None:
    cells = cells_on(64 * MIB)
    live = newest(3 * cells, cells)
    assert sorted(live.values()) == sorted(
        max(n for n in range(1, 3 * cells + 1) if place(n, cells) == each) for each in live
    )


def test_the_shapes_straddle_clusters_and_leave_blocks_half_written() -> None:
    in_cluster = [((ORIGIN + first) % CLUSTER, count) for first, count in SHAPES]
    assert any(count < 8 for _, count in in_cluster)
    assert any(start % 8 for start, _ in in_cluster)
    assert any(start and start + count > CLUSTER for start, count in in_cluster)
    assert (0, CLUSTER) in in_cluster


@pytest.mark.parametrize("size", [0, 512, 128 << 10, MIB + 1, (5003 + 1) * (128 << 10)])
def test_a_disk_that_does_not_suit_the_guest_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="does not suit the guest"):
        cells_on(size)
