"""The daemon is killed at any moment, while it streams and guests write: nothing acknowledged is lost.

OVERLAY_KILLS says how often; the chaos of a night takes thousands.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from overlay.formats.image import State
from overlay.formats.open import open_image
from tests.support.disks import KIB, MIB, random_disk
from tests.support.loops import loop_device
from tests.support.overlays import LAYOUTS, NBD_OVERLAY, NONE, Guest, Layout, make_overlay, overlay
from tests.support.processes import check, run, wait_until
from tests.support.servers import nbdserve

KILLS = int(os.environ.get("OVERLAY_KILLS", "8"))
SIZE = 64 * MIB
SECTOR = 512
AT_ONCE = 8


class Model:
    """What each sector of the disk may hold: what was acknowledged last, or what is under way."""

    def __init__(self, content: bytes) -> None:
        self.acknowledged = bytearray(content)
        self.under_way: list[tuple[int, bytes]] = []

    def log_writes(self, read: Callable[[int, int], bytes]) -> None:
        """See what the disk holds where writes were under way; from now on that is what it holds."""
        for begin, data in self.under_way:
            self.compare(begin, read(begin, len(data)))
        self.under_way.clear()

    def compare(self, begin: int, seen: bytes) -> None:
        """What the disk holds from an offset on is allowed there, and is what it holds from now on."""
        if seen != self.acknowledged[begin : begin + len(seen)]:
            for place in range(0, len(seen), SECTOR):
                sector, offset = seen[place : place + SECTOR], begin + place
                allowed = {bytes(self.acknowledged[offset : offset + SECTOR])}
                for start, data in self.under_way:
                    if start <= offset < start + len(data):
                        allowed.add(data[offset - start : offset - start + SECTOR])
                assert sector in allowed, f"the sector at {offset} holds what was never written there last"
        self.acknowledged[begin : begin + len(seen)] = seen


class Writer:
    """A guest that has several writes under way, to different places, until its disk goes away."""

    def __init__(self, guest: Guest, model: Model, place: int, seed: int) -> None:
        """Most writes go to the 4 MiB at ``place``, so that much of the disk stays for the next daemons."""
        self._guest = guest
        self._place = place
        self._model = model
        self._chance = random.Random(seed)
        self.acknowledged = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def has_done(self, count: int) -> bool:
        """Whether so many writes were acknowledged."""
        return self.acknowledged >= count

    def _run(self) -> None:
        started: list[tuple[int, bytes, Future[None]]] = []
        try:
            while True:
                while len(started) < AT_ONCE:
                    started.append(self._start([(offset, len(data)) for offset, data, _ in started]))
                offset, data, future = started.pop(0)
                self._model.under_way.append((offset, data))
                future.result(120)
                self._model.under_way.pop()
                self._model.acknowledged[offset : offset + len(data)] = data
                self.acknowledged += 1
        except OSError:
            self._model.under_way += [(offset, data) for offset, data, _ in started]

    def _start(self, busy: list[tuple[int, int]]) -> tuple[int, bytes, Future[None]]:
        """A write, or zeros, that meets none of those under way."""
        chance, client = self._chance, self._guest.client
        while True:
            length = chance.choice([SECTOR, 4 * KIB, 4 * KIB, 12 * KIB, 64 * KIB, 68 * KIB])
            begin, end = (self._place, self._place + 4 * MIB) if chance.random() < 0.98 else (0, SIZE)
            offset = chance.randrange(begin, end - length, SECTOR)
            if chance.random() < 0.7:
                offset -= offset % (4 * KIB)
            if all(offset + length <= begin or begin + count <= offset for begin, count in busy):
                break
        if chance.random() < 0.2:
            return offset, bytes(length), client.start_zero(offset, length, NONE)
        data = chance.randbytes(length)
        return offset, data, client.start_write(offset, data, NONE)


def local_part(image: Path, layout: Layout) -> int:
    """The bytes that an image has; the disk's size when it is finished."""
    with open_image(image, layout=layout) as opened:
        return sum(run.length for run in opened.runs(0, SIZE) if run.state is not State.ABSENT)


@contextmanager
def on_a_device(directory: Path, uri: str) -> Iterator[Path]:
    """An overlay on a block device that is exactly as large as the disk, and not empty."""
    random_disk(directory / "device", SIZE)
    with loop_device(directory / "device") as device:
        check(NBD_OVERLAY, "create", "--force", "--map", directory / "map", "--backing", uri, device)
        yield device


@pytest.mark.timeout(900 + 20 * KILLS)
@pytest.mark.parametrize("kind", [*LAYOUTS, "device"])
@pytest.mark.sampled(2)
def test_kill_9_at_any_moment_loses_no_acknowledged_write_and_leaves_no_wrong_block(
    kind: str, tmp_path: Path
) -> None:
    layout: Layout = "qed" if kind == "qed" else "flat"
    with nbdserve("--read-only", random_file(tmp_path), directory=tmp_path) as server, ExitStack() as stack:
        if kind == "device":
            image = stack.enter_context(on_a_device(tmp_path, server.uri()))
        else:
            image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        kill_again_and_again(image, layout, tmp_path)


def random_file(directory: Path) -> Path:
    """The disk at the source."""
    random_disk(directory / "disk", SIZE)
    return directory / "disk"


def kill_again_and_again(image: Path, layout: Layout, tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("OVERLAY_SEED", layout))
    model = Model((tmp_path / "disk").read_bytes())
    acknowledged = local = 0
    for number in range(KILLS):
        with ExitStack() as stack:
            daemon = stack.enter_context(overlay(image, "--stream", f"--speed={2 * MIB}", directory=tmp_path))
            guest = stack.enter_context(daemon.guest())
            # The first look is at what the kill before has left.
            model.log_writes(guest.read)
            place = number % (SIZE // (4 * MIB)) * 4 * MIB
            writer = Writer(guest, model, place, chance.randrange(1 << 30))
            wait_until(partial(writer.has_done, chance.randrange(40)), "so many writes are acknowledged")
            time.sleep(chance.random() * 0.1)
            daemon.process.kill()
            writer.thread.join(120)
            assert not writer.thread.is_alive()
            acknowledged += writer.acknowledged
        if layout == "qed":
            # Clusters that nothing refers to yet are leaked, which is all that may be wrong.
            checked = run("qemu-img", "check", "-f", "qed", image)
            assert checked.returncode in (0, 3), checked.stdout
        now = local_part(image, layout)
        assert now >= local or layout == "qed"
        local = now
    with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
        model.log_writes(guest.read)
        daemon.wait_for_status(complete=True)
        assert guest.read(0, SIZE) == model.acknowledged
    assert acknowledged > 5 * KILLS
    (tmp_path / "expected").write_bytes(model.acknowledged)
    driver = "raw" if layout == "flat" else "qed"
    check("qemu-img", "compare", "-f", driver, "-F", "raw", image, tmp_path / "expected")


def test_the_model_would_see_a_lost_write() -> None:
    model = Model(bytes(4 * SECTOR))
    model.under_way.append((SECTOR, b"\1" * SECTOR))
    model.log_writes(lambda _, length: bytes(length))
    model.compare(0, bytes(4 * SECTOR))
    model.acknowledged[SECTOR : 2 * SECTOR] = b"\2" * SECTOR
    with pytest.raises(AssertionError):
        model.compare(0, bytes(4 * SECTOR))
    with pytest.raises(AssertionError):
        model.compare(SECTOR, b"\1" * SECTOR)
