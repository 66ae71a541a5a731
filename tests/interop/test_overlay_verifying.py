"""What was copied is compared with the source before that is given up; what the guest wrote is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.overlays import NBD_OVERLAY, Daemon, make_overlay, overlay
from tests.support.processes import check, run, wait_until
from tests.support.servers import nbdserve, qemu_nbd

SIZE = 8 * MIB + 20 * KIB
BLOCK = 64 * KIB


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """The disk at the source, a part of which is zeros."""
    disk = bytearray(random_disk(tmp_path / "disk", SIZE))
    disk[3 * MIB : 5 * MIB] = bytes(2 * MIB)
    (tmp_path / "disk").write_bytes(disk)
    return bytes(disk)


@pytest.fixture
def image(tmp_path: Path, content: bytes) -> Iterator[Path]:
    """An overlay of it, whose source tells hashes."""
    with nbdserve("-r", "-fraw", "--block-hashes", tmp_path / "disk", directory=tmp_path) as server:
        yield make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())


def begin(daemon: Daemon) -> None:
    """Stream."""
    with daemon.monitor() as qmp:
        qmp.execute("block-stream", device="stream")


def damage(image: Path, offset: int) -> None:
    """Change a byte behind everybody's back."""
    with image.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def copied(daemon: Daemon) -> None:
    """Everything is there, as a guest has read it all."""
    with daemon.guest() as guest:
        guest.read(0, SIZE)


def test_an_equal_copy_is_verified_and_cut_loose(tmp_path: Path, image: Path, content: bytes) -> None:
    with overlay(image, "--stream", "--verify", directory=tmp_path) as daemon:
        told = daemon.wait_for_status(60.0, phase="done")
        assert told["verify"].pop("seconds") > 0
        assert told["verify"] == {"over": True, "compared": SIZE, "written": 0, "differing": 0, "first": None}
        shown = check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
        assert "verified  8 MiB" in shown or "verified" in shown
    assert not Path(f"{image}.map").exists()
    assert image.read_bytes() == content


def test_one_that_is_started_again_when_the_copy_is_complete_serves_it(
    tmp_path: Path, image: Path, content: bytes
) -> None:
    """Its guest has not moved to the file yet, and needs no comparison."""
    with overlay(image, "--stream", "--verify", directory=tmp_path) as daemon:
        daemon.wait_for_status(60.0, phase="done")
    options = ("--layout", "flat", "--verify")
    with overlay(image, *options, directory=tmp_path) as again, again.guest() as guest:
        assert guest.read(0, SIZE) == content


def test_what_the_guest_writes_before_and_meanwhile_is_left_out_and_counted(
    tmp_path: Path, image: Path, content: bytes
) -> None:
    with overlay(image, "--verify", directory=tmp_path) as daemon, daemon.guest() as guest:
        # In a block in part, in two blocks, of what is not here yet and of what is; and the disk's end.
        guest.read(6 * BLOCK, BLOCK)
        guest.write(6 * BLOCK + 512, random_bytes(512, seed=1))
        guest.write(8 * BLOCK - 4096, random_bytes(8192, seed=2))
        guest.zero(20 * BLOCK, 4096)
        guest.trim(30 * BLOCK, BLOCK)
        guest.write(SIZE - 512, random_bytes(512, seed=3))
        begin(daemon)
        told = daemon.wait_for_status(60.0, phase="done")
    written = 5 * BLOCK + 20 * KIB
    assert told["verify"]["written"] == written
    assert told["verify"]["compared"] == SIZE - written


@pytest.mark.parametrize("place", [5 * BLOCK + 77, 4 * MIB, SIZE - 1])
def test_a_block_that_was_damaged_is_found_and_the_source_is_kept(
    tmp_path: Path, image: Path, content: bytes, place: int
) -> None:
    with overlay(image, "--verify", directory=tmp_path) as daemon:
        copied(daemon)
        damage(image, place)
        begin(daemon)
        told = daemon.wait_for_status(60.0, phase="failed")
        first = place // BLOCK * BLOCK
        assert told["error"] == (
            f"1 block of 65536 bytes on this host and at the source differ, the first at {first}"
        )
        assert (told["verify"]["differing"], told["verify"]["first"]) == (1, first)
        assert not told["complete"]
        assert Path(f"{image}.map").exists()
        assert "1 blocks differ" in check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
        damage(image, place)
        with daemon.monitor() as qmp:
            qmp.execute("block-job-resume", device="stream")
        assert daemon.wait_for_status(60.0, phase="done")["verify"]["differing"] == 0
    assert image.read_bytes() == content


def test_whoever_wants_to_goes_on_without_it(tmp_path: Path, image: Path) -> None:
    with overlay(image, "--verify", directory=tmp_path) as daemon:
        copied(daemon)
        damage(image, 0)
        begin(daemon)
        daemon.wait_for_status(60.0, phase="failed")
        with daemon.monitor() as qmp:
            qmp.execute("overlay-verify", enable=False)
            qmp.execute("block-job-resume", device="stream")
        assert daemon.wait_for_status(60.0, phase="done")["verify"] is None


def test_a_daemon_that_is_killed_does_not_forget_what_the_guest_wrote(tmp_path: Path, image: Path) -> None:
    with overlay(image, "--verify", directory=tmp_path) as daemon, daemon.guest() as guest:
        guest.read(0, SIZE)
        guest.flush()
        guest.write(9 * BLOCK, random_bytes(BLOCK, seed=4))
        guest.write(11 * BLOCK + 4096, random_bytes(4096, seed=5))
        daemon.process.kill()
    with overlay(image, "--stream", "--verify", directory=tmp_path) as daemon:
        told = daemon.wait_for_status(60.0, phase="done")
        assert told["verify"]["written"] == 2 * BLOCK


def test_a_guest_that_writes_all_the_time_causes_no_false_alarm(tmp_path: Path, image: Path) -> None:
    with overlay(image, "--verify", directory=tmp_path) as daemon, daemon.guest() as guest:
        guest.read(0, SIZE)
        begin(daemon)
        number = 0
        with daemon.monitor() as qmp:
            while qmp.execute("query-overlay")["phase"] == "running":
                for _ in range(64):
                    number += 1
                    guest.write(
                        number * 7919 * 512 % (SIZE - 512) // 512 * 512, random_bytes(512, seed=number)
                    )
            assert qmp.execute("query-overlay")["phase"] == "done"


def test_a_source_that_tells_no_hashes_is_no_reason_to_believe_the_copy(
    tmp_path: Path, content: bytes
) -> None:
    with qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, "--stream", "--verify", directory=tmp_path) as daemon:
            told = daemon.wait_for_status(60.0, phase="failed")
    assert told["error"].startswith("the copy cannot be verified: the source tells no block hashes")


def test_a_layout_that_does_not_record_who_wrote_is_refused(tmp_path: Path, content: bytes) -> None:
    with nbdserve("-r", "-fraw", "--block-hashes", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "qed", SIZE, server.uri())
        done = run(NBD_OVERLAY, "serve", image, "-k", tmp_path / "socket", "--verify")
    assert done.returncode == 1
    assert "does not record what the guest writes" in done.stderr


def test_what_a_killed_daemon_was_writing_comes_again_and_is_no_difference(
    tmp_path: Path, image: Path
) -> None:
    with overlay(image, directory=tmp_path) as daemon:
        with daemon.guest() as guest:
            guest.read(0, SIZE)
            guest.write(0, bytes(512))
            # Otherwise what was copied is copied again.
            guest.flush()
        daemon.process.kill()
    # Stored, and neither acknowledged nor recorded.
    damage(image, 9 * BLOCK + 4096)
    with overlay(image, "--stream", "--verify", directory=tmp_path) as daemon, daemon.guest() as guest:
        with daemon.monitor() as qmp:
            wait_until(lambda: qmp.execute("query-overlay")["verify"]["differing"], "it is seen", 60.0)
        guest.write(9 * BLOCK + 4096, random_bytes(512, seed=6))
        told = daemon.wait_for_status(60.0, phase="done")
        assert told["verify"]["written"] == 2 * BLOCK
