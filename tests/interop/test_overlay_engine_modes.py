"""Before and after the cut-over, block status, and a destination that is full."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from tests.support.delay import delayed
from tests.support.disks import KIB, MIB, Run, random_bytes, random_disk, sparse_disk
from tests.support.overlays import LAYOUTS, Daemon, Layout, end, make_overlay, overlay, requests
from tests.support.processes import Argument, check, run, wait_until
from tests.support.servers import Server, UnixAddress, nbdkit

SIZE = 4 * MIB
both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def source(directory: Path, size: int = SIZE) -> Iterator[tuple[bytes, Path, Server]]:
    """A random disk, in the file ``disk``, at an nbdkit with a log: content, log, server."""
    content = random_disk(directory / "disk", size)
    log = directory / "requests.log"
    argv: list[Argument] = ["--filter=log", "file", directory / "disk", f"logfile={log}"]
    with nbdkit(*argv, directory=directory) as server:
        yield content, log, server


def change(disk: Path, offset: int, data: bytes) -> None:
    """The guest, which still runs at the source, writes."""
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@both
def test_an_armed_overlay_keeps_nothing_until_the_guest_is_there(layout: Layout, tmp_path: Path) -> None:
    new = random_bytes(64 * KIB, seed=9)
    with source(tmp_path) as (content, log, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--armed", directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, MIB) == content[:MIB]
            change(tmp_path / "disk", 0, new)
            assert guest.read(0, MIB) == new + content[64 * KIB : MIB]
            told = daemon.status()
            assert (told["local"], told["armed"], told["window"]) == (0, True, None)
            with daemon.monitor() as qmp:
                qmp.execute("overlay-activate")
                qmp.execute("overlay-activate")
            assert guest.read(0, MIB) == new + content[64 * KIB : MIB]
            before = len(requests(log))
            assert guest.read(0, MIB) == new + content[64 * KIB : MIB]
            # There may be more, of what is read ahead.
            assert all(asked.offset >= MIB for asked in requests(log)[before:])
            told = daemon.status()
            assert not told["armed"]
            assert told["local"] >= MIB


@both
def test_a_first_write_says_that_the_guest_is_here_and_starts_what_waited_for_it(
    layout: Layout, tmp_path: Path
) -> None:
    new = random_bytes(64 * KIB, seed=9)
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--armed", "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
            time.sleep(0.3)
            assert daemon.status()["local"] == 0
            guest.write(MIB, new)
            told = daemon.wait_for_status(phase="done")
            assert told["window"] is not None
            assert guest.read(0, SIZE) == content[:MIB] + new + content[MIB + 64 * KIB :]


@both
def test_what_changed_at_the_source_is_fetched_again_but_not_once_the_guest_is_here(
    layout: Layout, tmp_path: Path
) -> None:
    new = random_bytes(64 * KIB, seed=9)
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest, daemon.monitor() as qmp:
            assert guest.read(0, MIB) == content[:MIB]
            change(tmp_path / "disk", 128 * KIB, new)
            qmp.execute("overlay-invalidate", offset=128 * KIB, length=64 * KIB)
            expected = content[: 128 * KIB] + new + content[192 * KIB :]
            assert guest.read(0, MIB) == expected[:MIB]
            guest.write(MIB, new)
            with pytest.raises(ExecuteError):
                qmp.execute("overlay-invalidate", offset=0, length=64 * KIB)
            assert guest.read(0, MIB) == expected[:MIB]


@both
def test_what_was_on_its_way_when_the_source_changed_is_not_kept(layout: Layout, tmp_path: Path) -> None:
    new = random_bytes(64 * KIB, seed=9)
    with source(tmp_path) as (content, log, server), ExitStack() as stack:
        assert isinstance(server.address, UnixAddress)
        link = stack.enter_context(delayed(server.address, 0.3, tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, link.uri())
        daemon = stack.enter_context(overlay(image, "--connections=1", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        daemon.wait_until_connected()
        old = bytearray(64 * KIB)
        reading: Future[None] = guest.client.start_read(0, memoryview(old))
        wait_until(lambda: requests(log), "the source is asked")
        change(tmp_path / "disk", 0, new)
        with daemon.monitor() as qmp:
            qmp.execute("overlay-invalidate", offset=0, length=64 * KIB)
        reading.result(120)
        assert guest.read(0, 128 * KIB) == new + content[64 * KIB : 128 * KIB]


def status(daemon: Daemon, context: str, size: int) -> list[int]:
    """What nbdinfo tells of each sector of the disk."""
    listed = json.loads(check("nbdinfo", "--json", f"--map={context}", daemon.uri()))
    told: list[int] = []
    for extent in listed:
        assert extent["offset"] == len(told) * 512
        told += [extent["type"]] * (extent["length"] // 512)
    assert len(told) * 512 == size
    return told


@both
def test_block_status_tells_what_is_here_and_what_the_source_says_of_the_rest(
    layout: Layout, tmp_path: Path
) -> None:
    size = 4 * MIB + 3 * 512
    runs = [
        Run(offset, 64 * KIB, data=offset // (64 * KIB) % 3 == 0) for offset in range(0, 4 * MIB, 64 * KIB)
    ]
    runs.append(Run(4 * MIB, 3 * 512, data=True))
    content = sparse_disk(tmp_path / "disk", runs)
    allocation = [0 if run.data else 3 for run in runs for _ in range(run.length // 512)]
    depth = [2] * (size // 512)

    def now(offset: int, length: int, kind: int | None = None) -> None:
        """A range is here; if ``kind`` is given that is what it holds."""
        begin, stop = offset // 512, (offset + length) // 512
        depth[begin:stop] = [1] * (stop - begin)
        if kind is not None:
            allocation[begin:stop] = [kind] * (stop - begin)

    with nbdkit("file", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", layout, size, server.uri())
        arguments = ["--reconnect-timeout=1"]
        with overlay(image, *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_until_connected()
            assert status(daemon, "base:allocation", size) == allocation
            assert status(daemon, "qemu:allocation-depth", size) == depth
            guest.write(MIB, random_bytes(192 * KIB))
            now(MIB, 192 * KIB, 0)
            guest.zero(0, 64 * KIB)
            now(0, 64 * KIB, 3)
            guest.zero(2 * MIB, 256 * KIB)
            now(2 * MIB, 256 * KIB, 3)
            assert guest.read(3 * MIB, 64 * KIB) == content[3 * MIB : 3 * MIB + 64 * KIB]
            now(3 * MIB, 64 * KIB)
            guest.write(4 * MIB, bytes(512 * 3 - 1) + b"x")
            now(4 * MIB, 3 * 512, 0)
            guest.trim(3 * MIB, 64 * KIB)
            now(3 * MIB, 64 * KIB, 3)
            if layout == "flat":
                guest.write(3 * MIB + 128 * KIB, random_bytes(4 * KIB))
                now(3 * MIB + 128 * KIB, 4 * KIB, 0)
            else:
                # What was zeroed in a cluster that has data is not told apart.
                allocation[3 * MIB // 512 : (3 * MIB + 64 * KIB) // 512] = status(
                    daemon, "base:allocation", size
                )[3 * MIB // 512 : (3 * MIB + 64 * KIB) // 512]
            assert status(daemon, "base:allocation", size) == allocation
            assert status(daemon, "qemu:allocation-depth", size) == depth
            end(server)
            # Lost while it is asked: what it might have is data, and no error.
            for _ in range(2):
                lost = status(daemon, "base:allocation", size)
                assert lost == [0 if far == 2 else near for near, far in zip(allocation, depth, strict=True)]
            assert status(daemon, "qemu:allocation-depth", size) == depth


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@both
def test_a_full_destination_stops_the_job_and_the_guests_writes_and_goes_on_with_more_room(
    layout: Layout, tmp_path: Path
) -> None:
    size = 16 * MIB
    with source(tmp_path, size) as (content, _, server):
        small, template = tmp_path / "small", tmp_path / "template"
        small.mkdir()
        template.mkdir()
        make_overlay(template / "overlay", layout, size, server.uri())
        mount = (
            'mount -t tmpfs -o size=9M tmpfs "$1" && cp --sparse=always "$2"/* "$1" && shift 2 && exec "$@"'
        )
        wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh", str(small), str(template)]
        arguments = ["--stream"]
        with (
            overlay(small / "overlay", *arguments, directory=tmp_path, wrapper=wrapper) as daemon,
            daemon.guest() as guest,
        ):
            told = daemon.wait_for_status(phase="failed")
            assert "No space left" in told["error"]
            with daemon.monitor() as qmp:
                (job,) = qmp.execute("query-block-jobs")
                assert (job["status"], job["io-status"]) == ("paused", "nospace"), "QEMU's word for it"
            assert 0 < told["local"] < size
            # What cannot be kept can be read all the same.
            assert guest.read(0, size) == content
            new = random_bytes(4 * MIB, seed=4)
            place = size - 4 * MIB
            with pytest.raises(OSError) as full:
                guest.write(place, new)
            assert full.value.errno == errno.ENOSPC
            check("nsenter", "-m", "-t", str(daemon.process.pid), "mount", "-o", "remount,size=64M", small)
            guest.write(place, new)
            with daemon.monitor() as qmp:
                qmp.execute("block-job-resume", device="stream")
            daemon.wait_for_status(phase="done")
            assert guest.read(0, size) == content[:place] + new
            guest.flush()


def resources(pid: int) -> tuple[int, int, int]:
    """Threads, descriptors and resident bytes of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return int(fields["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(fields["VmRSS"]) * KIB


def uses_at_most(pid: int, most: tuple[int, int, int]) -> bool:
    """Whether a process uses no more of any of its resources."""
    return all(used <= limit for used, limit in zip(resources(pid), most, strict=True))


def test_fifty_lost_connections_leave_no_thread_descriptor_or_memory_behind(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", 16 * MIB)
    address = UnixAddress(tmp_path / "source.sock")
    image = make_overlay(tmp_path / "overlay", "flat", 16 * MIB, address.uri())
    with overlay(image, "--copy-on-read=off", directory=tmp_path) as daemon, daemon.guest() as guest:
        before: tuple[int, int, int] | None = None
        for number in range(50):
            with nbdkit("file", tmp_path / "disk", directory=tmp_path, at=address) as server:
                for offset in (number * 64 * KIB, 8 * MIB + number * 64 * KIB):
                    assert guest.read(offset, 64 * KIB) == content[offset : offset + 64 * KIB]
                if number in (5, 49):
                    wait_until(lambda: daemon.status()["sources"][0]["connections"] == 3, "all are there")
                if number == 5:
                    before = resources(daemon.process.pid)
                elif number == 49:
                    assert before is not None
                    most = (before[0] + 1, before[1] + 1, before[2] + 4 * MIB)
                    # The last of the connections that were lost may be closing still.
                    wait_until(partial(uses_at_most, daemon.process.pid, most), f"no more than {most}")
                end(server, signal.SIGKILL)
        assert daemon.process.output().count("connected, ") == 50


def test_a_map_that_cannot_be_removed_keeps_neither_job_nor_guest_waiting_and_goes_when_it_can(
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    content = random_disk(tmp_path / "disk", SIZE)
    if run("chattr", "+i", place).returncode != 0:
        pytest.skip("no file can be protected here")
    try:
        check("chattr", "-i", place)
        with nbdkit("file", tmp_path / "disk", directory=tmp_path) as server:
            image = make_overlay(place / "overlay", "flat", SIZE, server.uri())
            check("chattr", "+i", place)
            with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
                daemon.wait_for_status(phase="done")
                assert (place / "overlay.map").exists()
                guest.write(0, b"new")
                assert guest.read(0, SIZE) == b"new" + content[3:]
            assert "overlay.map cannot be removed: Operation not permitted" in daemon.log.read_text()
        # Who opens the disk next has it as well, and removes the map as soon as that is possible.
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, SIZE) == b"new" + content[3:]
            check("chattr", "-i", place)
            wait_until(lambda: not (place / "overlay.map").exists(), "the map is removed", 20)
    finally:
        check("chattr", "-i", place)
