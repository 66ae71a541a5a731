"""Random histories of several guests at once, while the disk fills from a source far away."""

from __future__ import annotations

import os
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.delay import delayed
from tests.support.disks import KIB, MIB, Run, sparse_disk
from tests.support.overlays import CLUSTER, LAYOUTS, Guest, Layout, make_overlay, overlay
from tests.support.servers import UnixAddress, nbdkit

SEEDS = [int(seed) for seed in os.environ.get("OVERLAY_SEEDS", "1").split(",")]
GUESTS = 4
STRIPE = 2560
"""In the first half of the disk each guest has every fourth stripe: several are in one grain."""
SHARED = 4 * MIB
ZONE = MIB
"""In the second half each has a MiB of its own."""
SIZE = SHARED + GUESTS * ZONE
STEPS = 120


class History:
    """One guest, which knows what it wrote where only it writes."""

    def __init__(self, guest: Guest, number: int, model: bytearray, cluster: int, seed: int) -> None:
        self._guest = guest
        self._number = number
        self._model = model
        self._cluster = cluster
        self._chance = random.Random(f"{seed}/{number}")
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            for _ in range(STEPS):
                self._step()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.failure = error

    def _place(self) -> tuple[int, int]:
        """A range that is this guest's own."""
        chance = self._chance
        if chance.random() < 0.5:
            stripe = chance.randrange(SHARED // STRIPE // GUESTS) * GUESTS + self._number
            begin, length = stripe * STRIPE, STRIPE
        else:
            begin, length = SHARED + self._number * ZONE, ZONE
        if chance.random() < 0.3 and length == ZONE:
            offset = chance.randrange(0, length, 64 * KIB)
            return begin + offset, min(64 * KIB * chance.randint(1, 4), length - offset)
        offset = chance.randrange(0, length, 512)
        return begin + offset, min(512 * chance.randint(1, 40), length - offset)

    def _step(self) -> None:
        offset, length = self._place()
        end, model, guest = offset + length, self._model, self._guest
        match self._chance.choice(["read", "read", "read", "write", "write", "zero", "trim", "flush"]):
            case "read":
                assert guest.read(offset, length) == model[offset:end], f"{length} bytes at {offset}"
            case "write":
                data = self._chance.randbytes(length)
                guest.write(offset, data)
                model[offset:end] = data
            case "zero":
                guest.zero(offset, length)
                model[offset:end] = bytes(length)
            case "trim":
                guest.trim(offset, length)
                self._look_at_trimmed(offset, end)
            case "flush":
                guest.flush()

    def _look_at_trimmed(self, offset: int, end: int) -> None:
        """Whole clusters are zeros after a trim; at the edges it is free to leave what was there."""
        seen, model = self._guest.read(offset, end - offset), self._model
        whole = range(-(-offset // self._cluster) * self._cluster, end // self._cluster * self._cluster)
        for place in range(offset, end, 512):
            sector = seen[place - offset : place - offset + 512]
            kept = place not in whole and sector == model[place : place + 512]
            assert kept or sector == bytes(512), f"the trimmed sector at {place}"
            model[place : place + 512] = sector


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_guests_that_read_write_zero_and_trim_at_once_each_find_what_they_left(
    layout: Layout, seed: int, tmp_path: Path
) -> None:
    runs = [Run(offset, 64 * KIB, data=offset // (64 * KIB) % 4 != 3) for offset in range(0, SIZE, 64 * KIB)]
    model = bytearray(sparse_disk(tmp_path / "disk", runs, seed))
    with ExitStack() as stack:
        server = stack.enter_context(nbdkit("file", tmp_path / "disk", directory=tmp_path))
        assert isinstance(server.address, UnixAddress)
        link = stack.enter_context(delayed(server.address, 0.01, tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, link.uri())
        daemon = stack.enter_context(overlay(image, "--stream", f"--speed={3 * MIB}", directory=tmp_path))
        daemon.wait_until_connected()
        histories = [
            History(stack.enter_context(daemon.guest()), number, model, CLUSTER[layout], seed)
            for number in range(GUESTS)
        ]
        for history in histories:
            history.thread.join(120)
            assert not history.thread.is_alive()
            if history.failure is not None:
                raise history.failure
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, SIZE) == model
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == model
