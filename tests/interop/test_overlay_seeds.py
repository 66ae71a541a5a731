"""A seed: what it has is not fetched, and nothing that it has wrongly gets into the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.exports.served_exports import Export, Exports
from tests.interop.test_overlay_invalidation import SlowDisk
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.inprocess import running
from tests.support.overlays import LAYOUTS, NBD_OVERLAY, Daemon, Layout, make_overlay, overlay
from tests.support.processes import check, run, wait_until
from tests.support.servers import nbdserve, qemu_nbd

SIZE = 8 * MIB + 20 * KIB
BLOCK = 64 * KIB
both = pytest.mark.parametrize("layout", LAYOUTS)


def older(directory: Path, content: bytes, *differing: int) -> Path:
    """A copy of the disk in which these blocks are not as they are now."""
    copy = bytearray(content)
    for number in differing:
        copy[number * BLOCK + 7] ^= 1
    path = directory / "seed"
    path.write_bytes(copy)
    return path


def streamed(directory: Path, layout: Layout, content: bytes, seed: Path, *source: str) -> tuple[int, int]:
    """Stream the disk with a seed, and see that it is right; bytes from the seed, and from the source."""
    with nbdserve("-r", "-fraw", *source, directory / "disk", directory=directory) as server:
        image = make_overlay(directory / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--stream", "--seed", seed, directory=directory) as daemon:
            told = daemon.wait_for_status(60.0, phase="done")
            assert told["seed"] == str(seed)
            with daemon.guest() as guest:
                assert guest.read(0, SIZE) == content
            shown = check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
            assert f"seed     {seed}: " in shown
    return told["seeded"], told["streamed"]


@both
def test_only_what_differs_from_the_seed_is_fetched(layout: Layout, tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    seed = older(tmp_path, content, 0, 5, 6, 100)
    seeded, fetched = streamed(tmp_path, layout, content, seed, "--block-hashes")
    # The disk does not end with a whole block.
    assert (seeded, fetched) == (124 * BLOCK, 4 * BLOCK + 20 * KIB)


@both
@pytest.mark.parametrize("change", [-3 * BLOCK - 100, 3 * BLOCK + 100])
def test_a_seed_may_be_shorter_or_longer_than_the_disk(layout: Layout, change: int, tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    seed = tmp_path / "seed"
    seed.write_bytes((content + random_bytes(MIB, seed=2))[: SIZE + change])
    seeded, _ = streamed(tmp_path, layout, content, seed, "--block-hashes")
    assert seeded == min(SIZE, SIZE + change) // BLOCK * BLOCK


def test_holes_of_a_seed_are_not_taken_for_the_disk_s_data_nor_is_the_disk_s_zero_for_lost(
    tmp_path: Path,
) -> None:
    content = bytearray(random_disk(tmp_path / "disk", SIZE))
    content[MIB : 2 * MIB] = bytes(MIB)
    (tmp_path / "disk").write_bytes(content)
    seed = tmp_path / "seed"
    with seed.open("wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), content[4 * MIB : 5 * MIB], 4 * MIB)
    seeded, _ = streamed(tmp_path, "flat", bytes(content), seed, "--block-hashes")
    assert seeded == MIB


def test_a_source_that_tells_no_hashes_is_copied_and_that_is_said(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    seed = older(tmp_path, content)
    assert streamed(tmp_path, "flat", content, seed) == (0, SIZE)
    with qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "other", "flat", SIZE, server.uri())
        with overlay(image, "--stream", "--seed", seed, directory=tmp_path) as daemon:
            told = daemon.wait_for_status(60.0, phase="done")
            assert "nbdserve --block-hashes" in told["seed-trouble"]
            shown = check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
            assert "not used any further: " in shown
        assert "the rest is copied" in daemon.log.read_text()
    assert image.read_bytes() == content


def test_what_the_guest_wrote_here_before_is_not_taken_from_the_seed(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    new = random_bytes(BLOCK, seed=3)
    with nbdserve("-r", "-fraw", "--block-hashes", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        seed = older(tmp_path, content)
        with overlay(image, "--seed", seed, directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.write(3 * BLOCK - 4 * KIB, new)
            with daemon.monitor() as qmp:
                qmp.execute("block-stream", device="stream")
            assert daemon.wait_for_status(60.0, phase="done")["seeded"] > 0
    expected = bytearray(content)
    expected[3 * BLOCK - 4 * KIB : 4 * BLOCK - 4 * KIB] = new
    assert image.read_bytes() == expected


@contextmanager
def slow(directory: Path, *options: str | Path) -> Iterator[tuple[SlowDisk, Daemon]]:
    """An overlay with a seed that equals the disk, whose hashes wait from now on."""
    disk = SlowDisk(SIZE)
    disk.content[:] = random_bytes(SIZE)
    seed = older(directory, bytes(disk.content))
    with running(Exports([Export("", disk, block_hashes=True)]), directory) as (_, address):
        image = make_overlay(directory / "overlay", "flat", SIZE, address.uri())
        with overlay(image, "--seed", seed, *options, directory=directory) as daemon:
            daemon.wait_until_connected()
            disk.gate.clear()
            try:
                with daemon.monitor() as qmp:
                    qmp.execute("block-stream", device="stream")
                wait_until(lambda: disk.waiting > 0, "the source is asked for hashes", 60.0)
                yield disk, daemon
            finally:
                disk.gate.set()


def test_hashes_of_what_the_guest_has_changed_since_are_not_believed(tmp_path: Path) -> None:
    new = random_bytes(MIB, seed=4)
    with slow(tmp_path, "--pre-copy") as (disk, daemon), daemon.guest() as guest:
        disk.content[:MIB] = new
        with daemon.monitor() as qmp:
            qmp.execute("overlay-invalidate", ranges=[[0, MIB]])
        disk.gate.set()
        told = daemon.wait_for_status(60.0, ready=True, local=SIZE)
        assert told["seeded"] <= SIZE - MIB
        assert guest.read(0, SIZE) == bytes(disk.content)


def test_a_pause_ends_comparing_and_it_goes_on_afterwards(tmp_path: Path) -> None:
    with slow(tmp_path) as (disk, daemon):
        with daemon.monitor() as qmp:
            qmp.execute("block-job-pause", device="stream")
            disk.gate.set()
            qmp.execute("block-job-resume", device="stream")
        told = daemon.wait_for_status(60.0, phase="done")
        assert (told["seeded"], told["seed-trouble"]) == (SIZE // BLOCK * BLOCK, None)
    assert (tmp_path / "overlay").read_bytes() == bytes(disk.content)


def test_what_is_no_seed_is_refused_in_one_line(tmp_path: Path) -> None:
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, "nbd://192.0.2.1/vm")
    (tmp_path / "link").symlink_to(image)
    os.link(image, tmp_path / "hard")
    check("qemu-img", "create", "-f", "qcow2", tmp_path / "x.qcow2", "1M")
    for seed, why in (
        ("overlay", "the seed is the image itself"),
        ("link", "the seed is the image itself"),
        ("hard", "the seed is the image itself"),
        ("overlay.map", "the seed is the image itself"),
        ("none", "the seed cannot be opened: No such file"),
        (".", "a seed is a raw file or a block device"),
        ("x.qcow2", "looks like a qcow2 image; a seed must be raw"),
    ):
        done = run(NBD_OVERLAY, "serve", "-k", tmp_path / "sock", "--seed", tmp_path / seed, image)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert why in done.stderr
