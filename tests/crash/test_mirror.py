"""A guest writes, its mirror follows, and either dies at any instant: the mirror is the disk as of a point.

A model keeps the whole disk as it was after each of the guest's changes. Whatever ends the receiver's
process, or its power, in the middle of whatever, what its image holds afterwards is exactly one of these:
that of the last batch that was committed, or of the one that was being committed. The guest's side forgets
what it has noted, too, now and then, as it is killed or has no room.

MIRROR_HISTORIES sets how many histories are tried.
"""

from __future__ import annotations

import os
import random
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.formats.flat.image import FlatImage
from overlay.formats.image import Image, State
from overlay.formats.redo import chunks, log
from overlay.formats.redo.chunks import DATA, RECORD, Commit, Point, chunk, read_told, zero_records
from overlay.formats.redo.log import RedoLog, begin_log
from overlay.mirror.recorder import Batch, Recorder
from overlay.mirror.target import MirrorTarget
from tests.crash.worlds import CLUSTER, CLUSTERS, SIZE, FlatWorld, small_tables
from tests.support.simulation import SECTOR, KilledError, SimulatedDisk

HISTORIES = int(os.environ.get("MIRROR_HISTORIES", "400"))
ROOM = 96 << 10
"""Of the notes: a few writes more than what comes between two batches, as a rule."""


class MirrorWorld(FlatWorld):
    """The receiver's three files."""

    def __init__(self) -> None:
        super().__init__()
        self.disks.append(SimulatedDisk())

    def open(self) -> FlatImage:
        image = super().open()
        assert isinstance(image, FlatImage)
        return image


class History:
    """A guest's disk and its mirror, beside all that the disk has been."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        backing = b"".join(chance.randbytes(8) * (SECTOR // 8) for _ in range(SIZE // SECTOR))
        self.backing = backing
        self.disk = bytearray(backing)
        self.guest_world, self.world = FlatWorld(), MirrorWorld()
        self.image = self.guest_world.open()
        self.recorder = Recorder(self.image, ROOM)
        mirror = self.world.open()
        begin_log(self.world.disks[2], SIZE, mirror.uuid)
        mirror.close()
        self.held = bytes(backing)
        """What the mirror holds."""
        self.marked: bytes | None = None
        """The disk at the guest's last flush, if anything was noted before that has not been sent."""
        self.number = 0
        self.open_mirror()
        self.instants = 0

    def open_mirror(self) -> None:
        self.mirror = self.world.open()
        self.log = RedoLog(self.world.disks[2], self.mirror, self.mirror.uuid, "disk.redo")
        self.target = MirrorTarget(self.log)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            match self.chance.choice(["write"] * 6 + ["zero", "flush", "ship", "ship", "kill", "reopen"]):
                case "flush":
                    self.recorder.flush()
                    self.marked = bytes(self.disk)
                case "ship":
                    self.ship()
                case "kill":
                    self.die_on_the_guests_side()
                case "reopen":
                    self.log.close()
                    self.mirror.close()
                    self.open_mirror()
                    self.check([self.held])
                case action:
                    self.change(action)
        self.ship()

    def change(self, action: str) -> None:
        """The guest changes a range, whole clusters or not, and it is acknowledged."""
        if self.chance.random() < 0.5:
            offset = self.chance.randrange(CLUSTERS) * CLUSTER
            end = min(SIZE, offset + self.chance.randint(1, 4) * CLUSTER)
        else:
            offset = self.chance.randrange(0, SIZE, SECTOR)
            end = min(SIZE, offset + self.chance.randint(1, 20) * SECTOR)
        data = bytes(end - offset) if action == "zero" else self.chance.randbytes(end - offset)
        while not (
            self.recorder.zero(offset, len(data)) if action == "zero" else self.recorder.write(offset, data)
        ):
            for edge in self.image.edges(offset, len(data)):
                begin = edge - edge % CLUSTER
                self.image.fill(begin, self.backing[begin : min(begin + CLUSTER, SIZE)])
        self.image.commit()
        self.disk[offset:end] = data

    def ship(self) -> None:
        """Send a batch; the receiver may die at any instant of it."""
        is_doomed = self.chance.random() < 0.4
        if is_doomed:
            self.instants = self.chance.choice([0, 1, 2, 3, 5, 8, 13, 21, 40])
            self.world.watch(self.count_down, self.chance.choice([0, 0, 1, 2, 7]))
        batch = self.recorder.begin()
        self.will_hold = self.held
        try:
            self.send(batch)
        except KilledError:
            self.recorder.abandoned(batch)
            # What was noted before the last flush may be dirty now, so that there is no such point any more.
            self.die_on_the_mirrors_side()
        else:
            self.recorder.committed(batch)
            self.held = self.will_hold
            self.check([self.held])
            if is_doomed:
                self.die_on_the_mirrors_side()

    def count_down(self) -> None:
        if not self.instants:
            raise KilledError
        self.instants -= 1

    def send(self, batch: Batch) -> None:
        told = read_told(bytes(self.read_page()), "mirror")
        records: list[bytes | bytearray] = []
        done = 0
        while True:
            for part in batch.rounds[done:]:
                done += 1
                for offset, length in part.ranges():
                    records += self.read(offset, length)
            if self.chance.random() < 0.3:
                self.change("write")
            is_to_flush = not batch.rounds and self.recorder._marked > 0
            notes = self.recorder.take(batch)
            if notes is not None:
                break
        if is_to_flush:
            assert self.marked is not None
            self.will_hold = self.marked
        else:
            self.will_hold = bytes(self.disk)
        records += notes
        self.number = told.point.number + 1
        pieces: list[tuple[int, bytes]] = []
        position, uuid = told.position, uuid4()
        while records or not pieces:
            count = self.chance.randint(1, 5)
            some, records = records[:count], records[count:]
            data = chunk(position, uuid, some, None if records else Point(self.number, 1))
            pieces.append((position, data))
            position += len(data)
        self.chance.shuffle(pieces)
        if self.chance.random() < 0.2:
            pieces.append(self.chance.choice(pieces))
        for place, data in pieces:
            self.target.write(place, data, fua=False)
            if self.chance.random() < 0.1:
                self.target.flush()
        self.target.write(0, Commit(self.image.uuid, position).pack(), fua=False)

    def read_page(self) -> bytearray:
        page = bytearray(chunks.PAGE)
        self.target.read_into(0, memoryview(page))
        return page

    def read(self, offset: int, length: int) -> list[bytes]:
        """What of a dirty range was written; the guest goes on meanwhile."""
        found = []
        for begin, count, state in list(self.recorder.written(offset, length)):
            if self.chance.random() < 0.1:
                self.change("write")
            zeros = state is State.ZERO
            data = zero_records(begin, count) if zeros else RECORD.pack(begin, count, DATA)
            found.append(data if zeros else data + self.image.read(begin, count))
        return found

    def die_on_the_mirrors_side(self) -> None:
        """Let its process die, or its power, perhaps again while it starts; see what it holds."""
        for _ in range(self.chance.choice([1, 1, 1, 2, 3])):
            if self.chance.random() < 0.5:
                self.world.cut_power(self.chance)
            else:
                self.world.kill()
            self.instants = self.chance.choice([0, 1, 2, 3, 5, 8])
            self.world.watch(self.count_down, self.chance.choice([0, 1, 7]))
            try:
                self.open_mirror()
            except KilledError:
                continue
            break
        else:
            self.world.kill()
            self.open_mirror()
        self.world.watch(lambda: None, 0)
        self.instants = 0
        self.held = self.check([self.held, self.will_hold])

    def die_on_the_guests_side(self) -> None:
        """What was noted, and what of it has arrived, is forgotten."""
        self.guest_world.kill()
        self.image = self.guest_world.open()
        self.recorder = Recorder(self.image, ROOM)

    def check(self, allowed: list[bytes]) -> bytes:
        """The mirror holds one of these, as a whole."""
        found = content(self.mirror, self.backing)
        assert found in allowed, "the mirror is no disk that there has been"
        return found


def content(image: Image, backing: bytes) -> bytes:
    """All of a disk."""
    parts = [
        backing[run.offset : run.offset + run.length]
        if run.state is State.ABSENT
        else image.read(run.offset, run.length)
        for run in image.runs(0, SIZE)
    ]
    return b"".join(parts)


@pytest.mark.timeout(1800)
def test_whatever_dies_the_mirror_is_the_disk_as_of_the_last_point_or_the_one_that_was_being_made() -> None:
    @settings(max_examples=HISTORIES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 1 << 64))
    def some_history(seed: int) -> None:
        chance = random.Random(seed)
        History(chance).run(chance.randint(1, 60))

    with small_tables(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "CHECKPOINT", 24 << 10)
        some_history()
