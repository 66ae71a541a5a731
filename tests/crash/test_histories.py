"""Random histories of an image in which the process, or the power, dies at any instant, again and again.

After the end of the process each sector must hold what was acknowledged last; after a power cut that, or
something that it has held since the last flush. What was under way may have happened or not, sector by
sector. Never may there be anything else: no lost flush, no stale copy, no zeros that nobody wrote.

CRASH_HISTORIES sets how many histories are tried with each layout.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.formats.image import Image, State
from tests.crash.worlds import (
    CHUNK,
    CLUSTER,
    CLUSTERS,
    SIZE,
    DeviceWorld,
    FlatWorld,
    LargerDeviceWorld,
    QedWorld,
    World,
    small_tables,
)
from tests.support.simulation import SECTOR, KilledError, SimulatedDisk

HISTORIES = int(os.environ.get("CRASH_HISTORIES", "1000"))
ACTIONS = (
    ["write_now"] * 5 + ["write"] * 5 + ["zero"] * 3 + ["fill"] * 6 + ["fill_zero"] * 2
    + ["commit", "flush", "flush", "invalidate", "reopen", "finish"]
)  # fmt: skip

BEFORE_CUT_OVER = (
    ["fill"] * 4 + ["invalidate"] * 3 + ["invalidate_in_flush"] * 2
    + ["flush"] * 2 + ["fill_zero", "reopen"]
)  # fmt: skip

Sectors = dict[int, bytes]


class History:
    """One image's life, beside what is known of each of its sectors."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.backing = [self.new_sector() for _ in range(SIZE // SECTOR)]
        for _ in range(6):
            place = chance.randrange(CLUSTERS) * CLUSTER // SECTOR
            self.backing[place : place + 16] = [bytes(SECTOR)] * len(self.backing[place : place + 16])
        self.latest = list(self.backing)
        self.after_kill = [{value} for value in self.latest]
        self.after_cut = [{value} for value in self.latest]
        self.touched: set[int] = set()
        """Clusters that the guest has written to."""
        self.unsettled: set[int] = set()
        """Sectors whose last writer was promised nothing yet."""
        self.image = world.open()
        self.instants = 0
        self.actions = BEFORE_CUT_OVER if chance.random() < 0.3 else ACTIONS

    def new_sector(self) -> bytes:
        return self.chance.randbytes(8) * (SECTOR // 8)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            doomed = self.chance.random() < 0.2
            if doomed:
                self.instants = self.chance.choice([0, 0, 0, 1, 1, 2, 3, 5, 8, 13])
                self.world.watch(self.count_down, self.chance.choice([0, 0, 1, 2, 7]))
            try:
                self.step(self.chance.choice(self.actions))
            except KilledError:
                pass
            if doomed:
                self.crash()
            else:
                self.check_some()
        self.crash()

    def count_down(self) -> None:
        if not self.instants:
            raise KilledError
        self.instants -= 1

    def step(self, action: str) -> None:
        match action:
            case "commit":
                self.image.commit()
                self.committed(range(len(self.latest)))
            case "flush":
                self.image.flush()
                self.flushed()
            case "reopen":
                self.image.close()
                self.flushed()
                self.image = self.world.open()
            case "finish":
                self.finish()
            case "fill":
                first, count = self.clusters(12)
                self.fetch(first, count)
            case "fill_zero":
                self.fill_zeros(*self.clusters(40))
            case "invalidate":
                before, asked_at = b"".join(self.backing), self.image.invalidations
                for begin, end in self.invalidate():
                    # What was asked for before, and comes only now.
                    assert self.image.fill(begin, before[begin:end], asked_at) == 0
                    assert self.image.fill_zero(begin, end - begin, asked_at) == 0
            case "invalidate_in_flush":
                self.world.during_sync(self.invalidate)
                self.image.flush()
            case _:
                self.change(action)

    def clusters(self, most: int) -> tuple[int, int]:
        first = self.chance.randrange(CLUSTERS)
        return first, min(self.chance.randint(1, most), CLUSTERS - first)

    def fetch(self, first: int, count: int) -> None:
        """Copy clusters from the backing."""
        begin, end = first * CLUSTER, min((first + count) * CLUSTER, SIZE)
        before = self.image.local_bytes
        filled = self.image.fill(begin, b"".join(self.backing[begin // SECTOR : end // SECTOR]))
        assert self.image.local_bytes == before + filled
        assert self.image.is_local(begin, end - begin)

    def fill_zeros(self, first: int, count: int) -> None:
        """Tell the image of the backing's zeros, as far as there are only such."""
        begin = first * CLUSTER // SECTOR
        end = min((first + count) * CLUSTER, SIZE) // SECTOR
        run = 0
        while begin + run < end and self.backing[begin + run] == bytes(SECTOR):
            run += 1
        if begin + run < end:
            run -= run % (CLUSTER // SECTOR)
        self.image.fill_zero(begin * SECTOR, run * SECTOR)

    def change(self, action: str) -> None:
        """The guest writes, and fetches first what it writes only in part."""
        if self.chance.random() < 0.5:
            first, count = self.clusters(3 if action != "zero" else 40)
            offset, end = first * CLUSTER, min((first + count) * CLUSTER, SIZE)
        else:
            offset = self.chance.randrange(0, SIZE, SECTOR)
            end = min(SIZE, offset + self.chance.randint(1, 20) * SECTOR)
        sectors = range(offset // SECTOR, end // SECTOR)
        new = {number: bytes(SECTOR) if action == "zero" else self.new_sector() for number in sectors}
        self.touched |= set(range(offset // CLUSTER, (end - 1) // CLUSTER + 1))
        self.allow(new)
        data = b"".join(new.values())
        if action == "write_now" and self.image.write_now(offset, data):
            self.done(new)
            self.unsettled |= set(sectors)
            if self.chance.random() < 0.6:
                self.image.log_writes()
                self.committed(sorted(self.unsettled))
                self.unsettled.clear()
            return
        self.unsettled -= set(sectors)
        for _ in range(3):
            if self.image.zero(offset, len(data)) if action == "zero" else self.image.write(offset, data):
                break
            for edge in (offset // CLUSTER, (end - 1) // CLUSTER):
                self.fetch(edge, 1)
        else:
            raise AssertionError("a write is refused though its edges are there")
        self.done(new)
        if self.chance.random() < 0.7:
            self.image.commit()
            self.committed(range(len(self.latest)))

    def invalidate(self) -> list[tuple[int, int]]:
        """The source has changed what the guest has not written to here, and what is copied is stale.

        Returns where (offset, end).
        """
        whole = (self.chance.randrange(CLUSTERS // CHUNK) * CHUNK, CHUNK)
        parts = [whole] + [self.clusters(self.chance.choice([1, 3, 20])) for _ in range(6)]
        parts = self.chance.sample(parts, self.chance.randint(1, len(parts)))
        clusters = {number for first, count in parts for number in range(first, first + count)}
        if not self.image.backings or not self.touched.isdisjoint(clusters):
            return []
        new = {number: self.new_sector() for cluster in clusters for number in sectors_in(cluster)}
        self.allow(new)
        for number, value in new.items():
            self.backing[number] = value
        ends = [(first * CLUSTER, min((first + count) * CLUSTER, SIZE)) for first, count in parts]
        self.image.invalidate([(begin, end - begin) for begin, end in ends])
        for begin, end in ends:
            assert not any(self.image.is_local(place, 1) for place in range(begin, end, CLUSTER))
        self.done(new)
        self.committed(new)
        for number, value in new.items():
            self.after_cut[number] = {value}
        return ends

    def finish(self) -> None:
        if self.chance.random() < 0.3:
            self.fetch(0, CLUSTERS)
        if not self.image.backings:
            self.image.finish()
        elif self.image.complete:
            self.image.finish()
            self.flushed()
            assert not self.image.backings
        else:
            with pytest.raises(OSError):
                self.image.finish()

    def allow(self, new: Sectors) -> None:
        """From now on these sectors may also hold something new."""
        for number, value in new.items():
            self.after_kill[number].add(value)
            self.after_cut[number].add(value)

    def done(self, new: Sectors) -> None:
        for number, value in new.items():
            self.latest[number] = value

    def committed(self, sectors: Iterable[int]) -> None:
        for number in sectors:
            self.after_kill[number] = {self.latest[number]}

    def flushed(self) -> None:
        self.committed(range(len(self.latest)))
        self.after_cut = [{value} for value in self.latest]

    def crash(self) -> None:
        """Let the process die, or the power; see what is there; go on with that."""
        cut = self.chance.random() < 0.5
        if cut:
            self.world.cut_power(self.chance)
        else:
            self.world.kill()
        self.image = self.world.open()
        allowed = self.after_cut if cut else self.after_kill
        found = self.content()
        for number, value in enumerate(found):
            assert value in allowed[number], f"sector {number} after {'a power cut' if cut else 'a kill'}"
        self.latest = found
        self.unsettled.clear()
        if cut:
            self.flushed()
        else:
            self.committed(range(len(found)))

    def content(self) -> list[bytes]:
        """All sectors as the guest sees them."""
        content = list(self.backing)
        local = 0
        for run in self.image.runs(0, SIZE):
            assert self.image.is_local(run.offset, run.length) is (run.state is not State.ABSENT)
            if run.state is State.ABSENT and self.image.backings:
                continue
            local += run.length
            data = self.image.read(run.offset, run.length)
            content[run.offset // SECTOR : (run.offset + run.length) // SECTOR] = sectors_of(data)
        assert self.image.local_bytes == local
        return content

    def check_some(self) -> None:
        """While nothing dies every read is exact."""
        offset = self.chance.randrange(0, SIZE, SECTOR)
        length = min(self.chance.randint(1, 30) * SECTOR, SIZE - offset)
        if self.image.is_local(offset, length):
            found = sectors_of(self.image.read(offset, length))
            assert found == self.latest[offset // SECTOR :][: len(found)]
        if self.chance.random() < 0.1:
            assert self.content() == self.latest


def sectors_of(data: bytes) -> list[bytes]:
    return [data[i : i + SECTOR] for i in range(0, len(data), SECTOR)]


def sectors_in(cluster: int) -> range:
    return range(cluster * CLUSTER // SECTOR, min((cluster + 1) * CLUSTER, SIZE) // SECTOR)


def live(world: World, seed: int) -> Image:
    chance = random.Random(seed)
    history = History(world, chance)
    history.run(chance.randint(1, 40))
    return history.image


@pytest.mark.parametrize(
    ("world", "histories"),
    [
        (FlatWorld, HISTORIES),
        (QedWorld, HISTORIES),
        # All but its last 4 KiB is as in a file.
        (DeviceWorld, HISTORIES // 3),
        pytest.param(LargerDeviceWorld, HISTORIES, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.timeout(3600)
def test_whatever_dies_each_sector_holds_an_allowed_value(world: type[World], histories: int) -> None:
    @settings(max_examples=histories, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 1 << 64))
    def some_history(seed: int) -> None:
        live(world(), seed)

    with small_tables():
        some_history()


def test_who_ends_an_interrupted_finish_waits_for_its_beginning() -> None:
    """Otherwise, after a power cut, the trailer is back and the map is gone."""
    with small_tables():
        world = FlatWorld()
        image = world.open()
        image.fill_zero(0, SIZE)
        image.flush()
        syncs = 0

        def die_before_the_second_sync() -> None:
            nonlocal syncs
            syncs += 1
            if syncs == 3:  # a sync, the truncation, a sync
                raise KilledError

        world.disks[0].before_change = die_before_the_second_sync
        with pytest.raises(KilledError):
            image.finish()
        assert world.disks[0].size() == SIZE
        world.kill()
        assert world.open().complete
        assert len(world.disks) == 1
        for seed in range(8):
            left = SimulatedDisk.holding(world.disks[0].after_power_cut(random.Random(seed)))
            assert left.size() == SIZE
