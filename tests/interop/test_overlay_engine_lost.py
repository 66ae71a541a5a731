"""A source that is lost, hangs, fails or is not what it was: waits and errors, never zeros, never stored."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk
from tests.support.overlays import LAYOUTS, Daemon, Guest, Layout, end, make_overlay, overlay, requests
from tests.support.processes import Argument, wait_until
from tests.support.servers import Server, UnixAddress, nbdkit, nbdserve, qemu_nbd

SIZE = 8 * MIB

both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def source(directory: Path, name: str = "source", seed: int = 1, size: int = SIZE) -> Iterator[Server]:
    """An nbdserve with a random disk at a socket of that name, where it can come back."""
    disk = directory / f"{name}.img"
    if not disk.exists():
        random_disk(disk, size, seed)
    with nbdserve(
        "--read-only", disk, directory=directory, at=UnixAddress(directory / f"{name}.sock")
    ) as server:
        yield server


def at(directory: Path, name: str = "source") -> str:
    """The URI of a source, whether it is there or not."""
    return UnixAddress(directory / f"{name}.sock").uri()


@both
def test_reads_wait_for_a_lost_source_and_are_right_when_it_is_back(layout: Layout, tmp_path: Path) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, at(tmp_path))
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, MIB) == content[:MIB]
        end(first)
        buffer = bytearray(64 * KIB)
        waiting = guest.client.start_read(4 * MIB, memoryview(buffer))
        assert guest.read(0, MIB) == content[:MIB]
        assert not waiting.done()
        stack.enter_context(source(tmp_path))
        waiting.result(120)
        assert buffer == content[4 * MIB : 4 * MIB + 64 * KIB]
        assert guest.read(0, SIZE) == content


def test_the_first_connection_is_used_while_the_server_is_slow_to_take_the_others(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", SIZE, 1)
    content = random_bytes(SIZE)
    # All others wait in its listen queue.
    one_client = ("--read-only", "--shared=1", tmp_path / "disk.img")
    with nbdserve(*one_client, directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            buffer = bytearray(MIB)
            guest.client.start_read(0, memoryview(buffer)).result(3.0)
            assert buffer == content[:MIB]
            wait_until(
                lambda: "going on with 1 connections" in daemon.process.output(), "the others' time", 10
            )
            assert guest.read(0, SIZE) == content


@both
def test_after_the_reconnect_timeout_a_read_is_an_error_and_never_zeros(
    layout: Layout, tmp_path: Path
) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, at(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=1", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, KIB) == content[:KIB]
        local = daemon.status()["local"]
        end(first)
        begun = time.monotonic()
        for _ in range(2):
            with pytest.raises(OSError) as failed:
                guest.read(4 * MIB, 4 * KIB)
            assert failed.value.errno == errno.EIO
        assert 0.9 < time.monotonic() - begun < 45  # unless told otherwise it would be 60 s
        with pytest.raises(OSError):
            guest.write(4 * MIB + 512, bytes(512))
        assert daemon.status()["local"] == local
        stack.enter_context(source(tmp_path))
        daemon.wait_until_connected()
        assert guest.read(0, SIZE) == content


@both
def test_a_job_without_a_source_fails_and_resume_tries_again(layout: Layout, tmp_path: Path) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, at(tmp_path))
        arguments = ["--reconnect-timeout=1", "--stream", "--speed=250000"]
        daemon = stack.enter_context(overlay(image, *arguments, directory=tmp_path))
        daemon.wait_until_connected()
        end(first)
        told = daemon.wait_for_status(phase="failed")
        assert "source.sock" in told["error"]
        assert 0 <= told["local"] < SIZE
        stack.enter_context(source(tmp_path))
        with daemon.monitor() as qmp:
            (job,) = qmp.execute("query-block-jobs")
            assert (job["io-status"], job["paused"]) == ("failed", True)
            qmp.execute("block-job-set-speed", device=job["device"], speed=0)
            qmp.execute("block-job-resume", device=job["device"])
        daemon.wait_for_status(phase="done")
        with daemon.guest() as guest:
            assert guest.read(0, SIZE) == content


def all_connected(daemon: Daemon) -> bool:
    """Whether every source of a daemon is."""
    return all(told["connected"] for told in daemon.status()["sources"])


def test_a_hung_source_gives_way_to_another_and_its_late_answers_land_nowhere(tmp_path: Path) -> None:
    """Both layouts at once, as a source counts as hung only after ten seconds.

    Daemons that have no other source are told to end meanwhile; they do, and lose nothing.
    """
    content, new = random_bytes(SIZE), random_bytes(MIB, seed=5)
    with ExitStack() as stack:
        hung, _ = (stack.enter_context(source(tmp_path, name)) for name in ("hung", "other"))
        uris = at(tmp_path, "hung"), at(tmp_path, "other")
        patient: list[tuple[Daemon, Guest]] = []
        ending: list[tuple[Daemon, Guest]] = []
        for layout in LAYOUTS:
            image = make_overlay(tmp_path / layout, layout, SIZE, *uris)
            backings = [f"--backing={uri}" for uri in uris]
            daemon = stack.enter_context(overlay(image, *backings, directory=tmp_path))
            patient.append((daemon, stack.enter_context(daemon.guest())))
            image = make_overlay(tmp_path / f"{layout}2", layout, SIZE, uris[0])
            daemon = stack.enter_context(overlay(image, "--stream", "--speed=65536", directory=tmp_path))
            ending.append((daemon, stack.enter_context(daemon.guest())))
        for daemon, guest in patient + ending:
            wait_until(partial(all_connected, daemon), "all are connected")
            assert guest.read(0, KIB) == content[:KIB]
        hung.process.freeze()
        begun = time.monotonic()
        waiting: list[tuple[bytearray, Future[None]]] = []
        for _, guest in patient + ending:
            guest.write(MIB, new)
            buffer = bytearray(MIB)
            waiting.append((buffer, guest.client.start_read(4 * MIB, memoryview(buffer))))
        for daemon, _ in ending:
            daemon.process.signal(signal.SIGTERM)
        for buffer, started in waiting[: len(patient)]:
            started.result(300)
            assert buffer == content[4 * MIB : 5 * MIB]
        for daemon, _ in ending:
            assert daemon.process.wait(30) == 0
        assert time.monotonic() - begun < 30
        for _, guest in patient:
            guest.write(4 * MIB, new)
        hung.process.signal(signal.SIGCONT)
        for _, guest in patient:
            assert guest.read(4 * MIB, MIB) == new
            assert guest.read(0, 4 * MIB) == content[:MIB] + new + content[2 * MIB : 4 * MIB]
        for daemon, _ in ending:
            again = stack.enter_context(overlay(daemon.image, directory=tmp_path))
            guest = stack.enter_context(again.guest())
            assert guest.read(0, SIZE) == content[:MIB] + new + content[2 * MIB :]


@both
def test_a_second_source_is_used_when_the_first_is_lost(layout: Layout, tmp_path: Path) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path, "first"))
        second = stack.enter_context(source(tmp_path, "second"))
        uris = [at(tmp_path, "first"), at(tmp_path, "second")]
        image = make_overlay(tmp_path / "overlay", layout, SIZE, *uris)
        backings = [f"--backing={uri}" for uri in uris]
        daemon = stack.enter_context(overlay(image, *backings, directory=tmp_path))
        wait_until(
            lambda: all(told["connected"] for told in daemon.status()["sources"]), "both are connected"
        )
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, KIB) == content[:KIB]
        end(first)
        begun = time.monotonic()
        assert guest.read(2 * MIB, 4 * MIB) == content[2 * MIB : 6 * MIB]
        assert time.monotonic() - begun < 45  # that long a source may be away
        stack.enter_context(source(tmp_path, "first"))
        end(second)
        assert guest.read(0, SIZE) == content


@both
@pytest.mark.parametrize(("seed", "size", "why"), [(2, SIZE, "another disk"), (1, SIZE + 512, "bytes")])
def test_another_disk_in_the_sources_place_is_refused(
    layout: Layout, seed: int, size: int, why: str, tmp_path: Path
) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, at(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=1", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, MIB) == content[:MIB]
        end(first)
        random_disk(tmp_path / "source.img", size, seed)
        stack.enter_context(source(tmp_path))
        with pytest.raises(OSError) as failed:
            guest.read(4 * MIB, 4 * KIB)
        assert failed.value.errno == errno.EIO
        # It is tried again and again; the read may have failed before it came.
        wait_until(lambda: why in daemon.status()["sources"][0]["trouble"], f"{why!r} is told")
        assert not daemon.status()["sources"][0]["connected"]


def test_another_disk_is_refused_by_a_daemon_that_was_restarted(tmp_path: Path) -> None:
    """In the flat layout; a QED image does not say which of its blocks were copied."""
    content = random_bytes(SIZE)
    with source(tmp_path):
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, at(tmp_path))
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, MIB) == content[:MIB]
            guest.write(0, bytes(64 * KIB))
            guest.write(512 * KIB, bytes(512))
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(MIB, MIB) == content[MIB : 2 * MIB]
    random_disk(tmp_path / "source.img", SIZE, seed=2)
    with (
        source(tmp_path),
        overlay(image, "--reconnect-timeout=1", directory=tmp_path) as daemon,
        daemon.guest() as guest,
    ):
        with pytest.raises(OSError):
            guest.read(4 * MIB, 4 * KIB)
        assert "another disk" in daemon.status()["sources"][0]["trouble"]


@both
@pytest.mark.parametrize("size", [ODD_SIZE, 512, 1])
def test_a_source_that_does_not_end_with_a_sector_is_padded_with_zeros(
    layout: Layout, size: int, tmp_path: Path
) -> None:
    content = random_disk(tmp_path / "disk", size)
    whole = content.ljust(-(-size // 512) * 512, b"\0")
    with nbdkit(
        "--filter=log", "file", tmp_path / "disk", f"logfile={tmp_path}/log", directory=tmp_path
    ) as server:
        image = make_overlay(tmp_path / "overlay", layout, size, server.uri())
        with overlay(image, "--reconnect-timeout=1", directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.client.size == len(whole)
            assert guest.read(len(whole) - 512, 512) == whole[-512:]
            with daemon.monitor() as qmp:
                qmp.execute("block-stream", device="disk")
            daemon.wait_for_status(phase="done")
            assert guest.read(0, len(whole)) == whole
    assert requests(tmp_path / "log")


@pytest.mark.parametrize("keep", ["on", "off"])
@pytest.mark.parametrize(
    "limits",
    [
        ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K"],
        ["blocksize-maximum=128K", "blocksize-preferred=64K"],
    ],
)
def test_a_source_that_takes_only_some_sizes_of_requests_is_asked_in_these(
    keep: str, limits: list[Argument], tmp_path: Path
) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    policy: list[Argument] = ["--filter=blocksize-policy", "file", tmp_path / "disk", *limits]
    policy.append("blocksize-error-policy=error")
    with nbdkit(*policy, directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        arguments = [f"--copy-on-read={keep}", "--reconnect-timeout=1"]
        with overlay(image, *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(512, 512) == content[512:1024]
            assert guest.read(MIB + 512, 3 * MIB) == content[MIB + 512 : 4 * MIB + 512]
            with daemon.monitor() as qmp:
                qmp.execute("block-stream", device="disk")
            daemon.wait_for_status(phase="done")
            assert guest.read(0, SIZE) == content


def test_qemu_nbd_that_comes_and_goes_leaves_nothing_but_right_blocks(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    address = UnixAddress(tmp_path / "source.sock")
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, address.uri())
    with overlay(image, "--stream", "--speed=500000", directory=tmp_path) as daemon, daemon.guest() as guest:
        for _ in range(4):
            with qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path, at=address) as server:
                daemon.wait_until_connected()
                time.sleep(0.2)
                end(server)
            with suppress(FileNotFoundError):
                address.path.unlink()
        with qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path, at=address):
            with daemon.monitor() as qmp:
                (job,) = qmp.execute("query-block-jobs")
                qmp.execute("block-job-set-speed", device=job["device"], speed=0)
            daemon.wait_for_status(phase="done")
            assert guest.read(0, SIZE) == content
