"""Streaming: what it fetches, how it is steered, and what the image is when it has come to its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from tests.support.delay import delayed
from tests.support.disks import KIB, MIB, Run, random_bytes, random_disk, sparse_disk
from tests.support.overlays import (
    LAYOUTS,
    Daemon,
    Layout,
    end,
    fetched_bytes,
    make_overlay,
    overlay,
    requests,
)
from tests.support.processes import check, wait_until
from tests.support.servers import Server, UnixAddress, nbdkit, qemu_nbd

SIZE = 16 * MIB

both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def source(directory: Path, content: bytes | None = None) -> Iterator[tuple[bytes, Path, Server]]:
    """A disk at an nbdkit with a log of its requests: content, log, server."""
    disk, log = directory / "disk", directory / "requests.log"
    if content is None:
        content = random_disk(disk, SIZE)
    with nbdkit("--filter=log", "file", disk, f"logfile={log}", directory=directory) as server:
        yield content, log, server


def has_fetched(log: Path, length: int) -> bool:
    """Whether more than so many bytes were read from a source."""
    return fetched_bytes(log) > length


def overlaps(log: Path) -> int:
    """How many bytes the source was asked for more than once."""
    twice, last = 0, 0
    for begin, stop in sorted((asked.offset, asked.offset + asked.length) for asked in requests(log)):
        twice += max(0, min(stop, last) - begin)
        last = max(last, stop)
    return twice


@both
@pytest.mark.parametrize("grain", [64 * KIB, 4 * KIB])
def test_of_a_half_empty_disk_only_what_is_allocated_is_fetched_and_once(
    layout: Layout, grain: int, tmp_path: Path
) -> None:
    runs = [Run(offset, grain, data=offset // grain % 2 == 0) for offset in range(0, SIZE, grain)]
    content = sparse_disk(tmp_path / "disk", runs)
    with source(tmp_path, content) as (_, log, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_for_status(phase="done")
            assert guest.read(0, SIZE) == content
        if layout == "flat" or grain == 64 * KIB:
            assert fetched_bytes(log) <= 1.01 * SIZE / 2
        assert overlaps(log) == 0
        assert image.stat().st_blocks * 512 <= 1.1 * SIZE / (
            2 if grain == 64 * KIB or layout == "flat" else 1
        )


@both
def test_when_all_is_local_the_image_needs_its_source_no_more(layout: Layout, tmp_path: Path) -> None:
    with ExitStack() as stack:
        content, log, server = stack.enter_context(source(tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        new = random_bytes(MIB, seed=7)
        guest.write(3 * MIB, new)
        expected = content[: 3 * MIB] + new + content[4 * MIB :]
        with daemon.monitor() as qmp:
            qmp.execute("block-stream", device="disk")
            while (event := qmp.event())["event"] != "BLOCK_JOB_COMPLETED":
                assert event["event"] in ("JOB_STATUS_CHANGE",), event
            assert event["data"]["len"] == event["data"]["offset"] == SIZE
            assert "error" not in event["data"]
            # At that very moment another process may take the image over, as QEMU does when it pivots.
            if layout == "flat":
                assert not image.with_name("overlay.map").exists()
                assert check("qemu-io", "-f", "raw", "-c", "read 0 512", image)
                assert image.read_bytes() == expected
            else:
                told = json.loads(check("qemu-img", "info", "-U", "--output=json", image))
                assert "backing-filename" not in told
        assert overlaps(log) == 0
        assert sum(asked.length for asked in requests(log)) == SIZE - MIB
        end(server)
        assert guest.read(0, SIZE) == expected
        guest.write(0, new)
        guest.flush()
        expected = new + expected[MIB:]
    (tmp_path / "expected").write_bytes(expected)
    if layout == "qed":
        check("qemu-img", "check", "-f", "qed", image)
    compared = ["-f", "raw" if layout == "flat" else "qed", "-F", "raw"]
    check("qemu-img", "compare", *compared, image, tmp_path / "expected")


@both
def test_pause_resume_and_speed_take_effect_at_once_and_progress_never_goes_back(
    layout: Layout, tmp_path: Path
) -> None:
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.monitor() as qmp:
            offsets: list[int] = []

            def job() -> dict[str, Any]:
                (told,) = qmp.execute("query-block-jobs")
                offsets.append(told["offset"])
                assert isinstance(told, dict)
                return told

            qmp.execute("block-stream", device="disk", speed=512 * KIB)
            wait_until(lambda: job()["offset"] > 0, "something has been copied")
            qmp.execute("block-job-pause", device="disk")
            wait_until(lambda: daemon.status()["in-flight"] == 0, "what was under way has come")
            rested = job()
            time.sleep(0.5)
            assert job()["offset"] == rested["offset"]
            assert rested["paused"]
            qmp.execute("block-job-resume", device="disk")
            wait_until(lambda: job()["offset"] > rested["offset"], "it goes on")
            qmp.execute("block-job-set-speed", device="disk", speed=0)
            wait_until(lambda: not qmp.execute("query-block-jobs"), "it has ended")
            assert offsets == sorted(offsets)
        assert make_sure(image, layout, tmp_path) == content


def make_sure(image: Path, layout: Layout, directory: Path) -> bytes:
    """What QEMU reads from an image that is complete."""
    raw = directory / "converted"
    driver = "raw" if layout == "flat" else "qed"
    check("qemu-img", "convert", "-f", driver, "-O", "raw", image, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("speed", [3_000_000])
def test_a_speed_limit_holds_within_five_per_cent_over_seconds(speed: int, tmp_path: Path) -> None:
    with source(tmp_path) as (_, log, server):
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, "--stream", f"--speed={speed}", directory=tmp_path) as daemon:
            wait_until(lambda: requests(log), "the source is asked")
            begun, before = time.monotonic(), fetched_bytes(log)
            wait_until(partial(has_fetched, log, before + 3 * speed), "what comes in three seconds", 30.0)
            passed, seconds = fetched_bytes(log) - before, time.monotonic() - begun
            # A busy machine may be late, and catches up by no more than a burst.
            assert passed <= 1.05 * speed * seconds + 128 * KIB
            assert daemon.process.running


def test_after_kill_9_streaming_goes_on_and_fetches_again_only_what_was_not_durable(tmp_path: Path) -> None:
    speed = MIB
    content = random_disk(tmp_path / "disk", SIZE)
    with ExitStack() as stack:
        began: list[tuple[Path, Path, Daemon]] = []
        for layout in LAYOUTS:
            log = tmp_path / f"{layout}.requests"
            argv = ["--filter=log", "file", str(tmp_path / "disk"), f"logfile={log}"]
            server = stack.enter_context(nbdkit(*argv, directory=tmp_path))
            image = make_overlay(tmp_path / layout, layout, SIZE, server.uri())
            daemon = stack.enter_context(overlay(image, "--stream", f"--speed={speed}", directory=tmp_path))
            began.append((image, log, daemon))
        for image, log, daemon in began:
            wait_until(partial(has_fetched, log, 12 * MIB), "most has been fetched", 30.0)
            daemon.process.kill()
            again = stack.enter_context(overlay(image, "--stream", directory=tmp_path))
            again.wait_for_status(phase="done")
            with again.guest() as guest:
                assert guest.read(0, SIZE) == content
            # Every two seconds what was fetched becomes durable, or later on a busy machine.
            assert fetched_bytes(log) <= SIZE + 8 * speed < SIZE + 12 * MIB


@both
def test_a_disk_of_zeros_is_copied_without_reading_it_and_takes_no_space(
    layout: Layout, tmp_path: Path
) -> None:
    size = 1 << 36
    with nbdkit("--filter=log", "null", str(size), f"logfile={tmp_path}/log", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", layout, size, server.uri())
        with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_for_status(60.0, phase="done")
            assert guest.read(size - MIB, MIB) == bytes(MIB)
    assert fetched_bytes(tmp_path / "log") == 0
    assert image.stat().st_blocks * 512 < 300 * MIB


def test_a_huge_disk_of_zeros_comes_to_an_end_in_little_memory(tmp_path: Path) -> None:
    """15 TiB, as ext4 has no file of 16 TiB and a block."""
    size = 15 << 40
    with nbdkit("null", str(size), directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", size, server.uri())
        begun = time.monotonic()
        with overlay(image, directory=tmp_path) as daemon, daemon.monitor() as qmp:
            started = time.monotonic() - begun
            qmp.execute("block-stream", device="disk")
            daemon.wait_for_status(100.0, phase="done")
            status = Path(f"/proc/{daemon.process.pid}/status").read_text()
            (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            print(f"started in {started:.2f} s, finished in {time.monotonic() - begun:.2f} s, {peak} KiB")
            assert peak < 150 * KIB
    assert image.stat().st_size == size


def test_qemu_finishes_what_the_daemon_began_and_the_other_way_round(tmp_path: Path) -> None:
    """QED only: QEMU does not read a flat image before it is complete."""
    layout: Layout = "qed"
    with ExitStack() as stack:
        content = random_disk(tmp_path / "disk", SIZE)
        address = UnixAddress(tmp_path / "source.sock")
        stack.enter_context(qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path, at=address))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
        new = random_bytes(64 * KIB, seed=3)
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, 5 * MIB) == content[: 5 * MIB]
            guest.write(6 * MIB, new)
            guest.zero(7 * MIB, 64 * KIB)
        expected = bytearray(content)
        expected[6 * MIB : 6 * MIB + 64 * KIB] = new
        expected[7 * MIB : 7 * MIB + 64 * KIB] = bytes(64 * KIB)
        check("qemu-img", "check", "-f", "qed", image)
        check("qemu-io", "-f", "qed", "-c", "write -P 0x5a 8M 64k", image)
        expected[8 * MIB : 8 * MIB + 64 * KIB] = b"\x5a" * (64 * KIB)
        (tmp_path / "expected").write_bytes(expected)
        check("qemu-img", "compare", "-f", "qed", "-F", "raw", image, tmp_path / "expected")
        # QEMU has written to it and half filled it; the daemon finishes.
        check("qemu-io", "-C", "-f", "qed", "-c", "read 9M 2M", image)
        with overlay(image, "--stream", directory=tmp_path) as daemon:
            daemon.wait_for_status(phase="done")
        check("qemu-img", "check", "-f", "qed", image)
        assert make_sure(image, layout, tmp_path) == expected
        # And the other way: the daemon half fills, QEMU streams the rest.
        other = make_overlay(tmp_path / "other", layout, SIZE, address.uri())
        with overlay(other, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(3 * MIB, 5 * MIB) == content[3 * MIB : 8 * MIB]
        check("qemu-img", "rebase", "-f", "qed", "-b", "", other, seconds=60)
        assert make_sure(other, layout, tmp_path) == content


@both
def test_a_link_with_a_long_way_is_streamed_over_and_the_guest_is_served_meanwhile(
    layout: Layout, tmp_path: Path
) -> None:
    with source(tmp_path) as (content, log, server), ExitStack() as stack:
        assert isinstance(server.address, UnixAddress)
        link = stack.enter_context(delayed(server.address, 0.05, tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, link.uri())
        daemon = stack.enter_context(overlay(image, "--stream", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        for offset in range(SIZE - 4 * KIB, 0, -3 * MIB):
            assert guest.read(offset, 4 * KIB) == content[offset : offset + 4 * KIB]
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == content
        assert overlaps(log) == 0


def test_a_job_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with source(tmp_path) as (_, _, server):
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, "--armed", "--stream", directory=tmp_path) as daemon:
            refuses(daemon, "block-stream", device="disk")
            refuses(daemon, "block-job-pause", device="disk")
            with daemon.monitor() as qmp:
                qmp.execute("overlay-activate")
            told = daemon.wait_for_status(phase="done")
            assert told["complete"]
            refuses(daemon, "overlay-invalidate", offset=0, length=4096)


def refuses(daemon: Daemon, command: str, **arguments: object) -> None:
    """The monitor answers with an error."""

    with daemon.monitor() as qmp, pytest.raises(ExecuteError):
        qmp.execute(command, **arguments)
