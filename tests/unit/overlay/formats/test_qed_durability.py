"""Power cuts, on a simulated disk that loses, reorders and tears whatever was not synced."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.formats.image import Backing, State
from overlay.formats.qed.check import check
from overlay.formats.qed.create import new_header
from overlay.formats.qed.header import read_header
from overlay.formats.qed.image import QedImage
from tests.support.simulation import SECTOR, SimulatedDisk

CLUSTER = 4096
CLUSTERS = 1100
"""More than one L2 table maps, at a table size of two clusters."""

IN_BACKING = b"backing"


def new_disk(backing: bool) -> SimulatedDisk:
    name = Backing("nbd://h/", raw=True) if backing else None
    header = new_header(CLUSTERS * CLUSTER - SECTOR, name, CLUSTER, 2)
    content = header.pack() + (b"nbd://h/" if backing else b"")
    return SimulatedDisk.holding(content.ljust(header.l1_table_offset + header.table_bytes, b"\0"))


class History:
    """An image under test, and what each sector of its disk may hold after a power cut."""

    def __init__(self, backing: bool, chance: random.Random) -> None:
        self.disk = new_disk(backing)
        self.image = QedImage(self.disk, "disk", writable=True)
        self.chance = chance
        self.backing = backing
        original = IN_BACKING if backing else bytes(SECTOR)
        self.latest = [original] * (self.image.size // SECTOR)
        self.allowed = [{original} for _ in self.latest]
        self.spots = [chance.randrange(CLUSTERS) for _ in range(4)]

    def step(self) -> None:
        action = self.chance.choice(["write"] * 4 + ["zero", "commit", "flush"])
        if action == "commit":
            self.image.commit()
        elif action == "flush":
            self.image.flush()
            self.allowed = [{value} for value in self.latest]
        else:
            self.change(action)

    def change(self, action: str) -> None:
        offset = self.chance.choice(self.spots) * CLUSTER
        length = min(self.chance.randint(1, 3) * CLUSTER, self.image.size - offset)
        if not self.backing:
            offset += self.chance.randrange(0, CLUSTER, SECTOR)
            length = min(
                max(SECTOR, length - self.chance.randrange(0, CLUSTER, SECTOR)), self.image.size - offset
            )
        data = bytes(length)
        if action == "write":
            data = b"".join(self.chance.randbytes(8) * (SECTOR // 8) for _ in range(length // SECTOR))
        for sector in range(length // SECTOR):
            value = data[sector * SECTOR : (sector + 1) * SECTOR]
            self.latest[offset // SECTOR + sector] = value
            self.allowed[offset // SECTOR + sector].add(value)
        if action == "write":
            self.image.write(offset, data)
        else:
            self.image.zero(offset, length)

    def cut_power(self) -> None:
        """Look at one of the disks that a power cut could leave behind right now."""
        for sector, value in enumerate(self.found(self.disk.after_power_cut(self.chance))):
            assert value in self.allowed[sector], f"sector {sector}"

    def cut_power_sometimes(self) -> None:
        if self.chance.random() < 0.05:
            self.cut_power()

    def found(self, content: bytes) -> list[bytes]:
        """What each sector holds in an image with this content, which must be sound."""
        left = SimulatedDisk.holding(content)
        report = check(left, read_header(left, "disk")[0])
        assert report.corruptions == 0, report.problems
        image = QedImage(left, "disk", writable=True)
        sectors: list[bytes] = []
        for run in image.runs(0, image.size):
            if self.backing and run.state is State.ABSENT:
                sectors += [IN_BACKING] * (run.length // SECTOR)
            else:
                data = image.read(run.offset, run.length)
                sectors += [data[i : i + SECTOR] for i in range(0, len(data), SECTOR)]
        return sectors


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_after_a_power_cut_each_sector_holds_an_old_or_a_new_value_and_flushed_ones_the_new(
    seed: int, backing: bool
) -> None:
    chance = random.Random(seed)
    history = History(backing, chance)
    history.disk.before_change = history.cut_power_sometimes
    for _ in range(chance.randint(1, 25)):
        history.step()
    history.cut_power()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_after_a_commit_killing_the_process_loses_nothing(seed: int, backing: bool) -> None:
    chance = random.Random(seed)
    history = History(backing, chance)
    for _ in range(chance.randint(1, 25)):
        history.step()
    history.image.commit()
    assert history.found(bytes(history.disk.content)) == history.latest
