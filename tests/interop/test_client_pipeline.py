"""Many threads and many requests in flight on one connection, and an upstream that comes and goes."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.client import Client, Fate, Upstream, connect
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import CommandFlags
from tests.support.disks import KIB, MIB, random_bytes, random_disk, sparse_disk, sparse_runs
from tests.support.overlays import requests
from tests.support.pausing import paused
from tests.support.processes import wait_until
from tests.support.servers import Server, UnixAddress, nbdkit, qemu_nbd

NONE = CommandFlags(0)


def threads_named(text: str) -> list[str]:
    """The names of our living threads that contain the text."""
    return [thread.name for thread in threading.enumerate() if text in thread.name]


def test_many_requests_are_in_flight_at_a_time(tmp_path: Path) -> None:
    control, log = tmp_path / "control", tmp_path / "requests"
    argv = ["--threads=64", "--filter=log", "--filter=pause", "memory", "64M"]
    argv += [f"logfile={log}", f"pause-control={control}"]
    with nbdkit(*argv, directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        buffers = [bytearray(4096) for _ in range(64)]
        with paused(control):
            started = [client.start_read(at * MIB, memoryview(buffer)) for at, buffer in enumerate(buffers)]
            wait_until(lambda: len(requests(log)) == 64, "all have reached the server")
            assert not any(future.done() for future in started)
        for future in started:
            assert future.result(120) is None


def test_threads_share_a_connection_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", 16 * MIB)
    failures: list[str] = []
    with (
        qemu_nbd("-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):

        def work(seed: int) -> None:
            # Each thread has a MiB of its own to write to, and reads all over the rest.
            chance = random.Random(seed)
            mine = bytearray(content[seed * MIB : (seed + 1) * MIB])
            for _ in range(60):
                offset, length = chance.randrange(MIB - 70000), chance.randrange(1, 70000)
                data = chance.randbytes(length)
                client.start_write(seed * MIB + offset, data, NONE).result()
                mine[offset : offset + length] = data
                offset, length = chance.randrange(8 * MIB, 15 * MIB), chance.randrange(1, MIB)
                if client.read(offset, length) != content[offset : offset + length]:
                    failures.append(f"{seed}: wrong bytes at {offset}")
            if client.read(seed * MIB, MIB) != mine:
                failures.append(f"{seed}: wrong bytes in what was written")

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures


def test_long_writes_and_reads_cross_without_stopping_each_other(tmp_path: Path) -> None:
    with nbdkit("memory", "64M", directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        data = random_bytes(8 * MIB)
        started: list[Future[None]] = [client.start_write(0, data, NONE) for _ in range(8)]
        buffers = [bytearray(8 * MIB) for _ in range(8)]
        started += [client.start_read(32 * MIB, memoryview(buffer)) for buffer in buffers]
        for future in started:
            future.result(120)
        assert client.read(0, 8 * MIB) == data


def test_a_callback_may_start_the_next_request(tmp_path: Path) -> None:
    with nbdkit("memory", "1M", directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        done = threading.Event()
        buffer = memoryview(bytearray(512))
        left = 100

        def go_on(future: Future[None]) -> None:
            nonlocal left
            left -= 1
            if left:
                client.start_read(0, buffer).add_done_callback(go_on)
            else:
                done.set()

        client.start_read(0, buffer).add_done_callback(go_on)
        assert done.wait(120)


def test_every_request_does_what_it_says(tmp_path: Path) -> None:
    content = bytearray(sparse_disk(tmp_path / "disk", sparse_runs(4 * MIB)))
    with (
        qemu_nbd("-A", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        connect(parse_uri(server.uri()), contexts=None) as client,
    ):
        assert client.export.contexts == ("base:allocation", "qemu:allocation-depth")
        client.start_write(1000, b"written", CommandFlags.FUA).result()
        client.start_zero(MIB, 64 * KIB, CommandFlags.NO_HOLE).result()
        client.start_trim(2 * MIB, 64 * KIB, NONE).result()
        client.start_cache(0, MIB).result()
        client.start_flush().result()
        depth = client.start_extents(0, 4 * MIB, "qemu:allocation-depth").result()
        assert [run.flags for run in depth] == [1]
        content[1000:1007] = b"written"
        content[MIB : MIB + 64 * KIB] = content[2 * MIB : 2 * MIB + 64 * KIB] = bytes(64 * KIB)
        assert client.read(0, 4 * MIB) == content
    assert (tmp_path / "disk").read_bytes() == content


def test_closing_ends_the_thread_and_fails_what_is_in_flight(tmp_path: Path) -> None:
    delayed = ["--filter=delay", "memory", "1M", "delay-read=5"]
    with nbdkit(*delayed, directory=tmp_path) as server:
        client = connect(parse_uri(server.uri()))
        name = str(client.uri)
        assert not threads_named(name), "a connection that nobody uses needs no thread"
        future = client.start_read(0, memoryview(bytearray(512)))
        assert threads_named(name)
        client.close()
        with pytest.raises(OSError) as failed:
            future.result(120)
        assert failed.value.errno in (errno.ENOTCONN, errno.ESHUTDOWN)
        assert not threads_named(name)
        client.close()


def test_a_server_that_dies_while_nobody_asks_is_noticed(tmp_path: Path) -> None:
    with nbdkit("memory", "1M", directory=tmp_path) as server:
        client = connect(parse_uri(server.uri()))
        assert client.read(0, 512) == bytes(512)
        server.process.kill()
        wait_until(lambda: not client.connected, "the connection is known to be lost")


def test_the_death_of_a_server_fails_everything_in_flight_at_once(tmp_path: Path) -> None:
    delayed = ["--filter=delay", "memory", "1M", "delay-read=30", "--threads=32"]
    with nbdkit(*delayed, directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        futures = [client.start_read(0, memoryview(bytearray(512))) for _ in range(20)]
        server.process.kill()
        for future in futures:
            with pytest.raises(OSError) as failed:
                future.result(120)
            assert failed.value.errno == errno.ENOTCONN


# Upstreams.


class Disk:
    """A server at a fixed address that can be killed and started again."""

    def __init__(self, directory: Path, size: int = MIB) -> None:
        self.directory = directory
        self.address = UnixAddress(directory / "upstream.sock")
        self.image = directory / "upstream.img"
        self.content = random_disk(self.image, size)
        self.uri = parse_uri(self.address.uri())

    @contextmanager
    def served(self) -> Iterator[Server]:
        """Serve it until the block ends, or somebody kills the server."""
        self.address.path.unlink(missing_ok=True)
        with qemu_nbd("-f", "raw", self.image, directory=self.directory, at=self.address) as server:
            yield server

    def dial(self, timeout: float) -> Client:
        """Connect to it."""
        return connect(self.uri, timeout=timeout)

    def upstream(self, patience: float, fate: Fate = Fate.UNKNOWN) -> Upstream:
        """Reach it through what is tested."""
        return Upstream("disk", self.dial, patience=patience, fate=lambda: fate)


def read(upstream: Upstream, offset: int, length: int) -> bytes:
    """Read through an upstream."""
    data = bytearray(length)
    upstream.call(Client.start_read, offset, memoryview(data))
    return bytes(data)


def write(upstream: Upstream, offset: int, data: bytes) -> None:
    """Write through an upstream."""
    upstream.change(False, Client.start_write, offset, data, NONE)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A disk of one MiB."""
    return Disk(tmp_path)


def test_a_lost_server_is_an_error_without_patience_and_reached_again_later(disk: Disk) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=0)
        assert read(upstream, 5, 10) == disk.content[5:15]
        server.process.kill()
    for _ in range(3):
        with pytest.raises(OSError) as failed:
            read(upstream, 0, 512)
        assert failed.value.errno == errno.EIO
    with disk.served():
        assert read(upstream, 5, 10) == disk.content[5:15]
        upstream.close()
        with pytest.raises(OSError):
            read(upstream, 0, 512)


def test_requests_wait_for_a_server_that_comes_back_in_time(disk: Disk) -> None:
    results: list[bytes] = []
    with disk.served() as server:
        upstream = disk.upstream(patience=20)
        read(upstream, 0, 1)
        server.process.kill()
    waiting = [
        threading.Thread(target=lambda place=place: results.append(read(upstream, place, 512)))
        for place in [7] * 10
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    assert not results
    with disk.served():
        for thread in waiting:
            thread.join(120)
        assert results == [disk.content[7:519]] * 10
        upstream.close()


def test_patience_has_an_end(disk: Disk) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=1)
        server.process.kill()
    begun = time.monotonic()
    with pytest.raises(OSError) as failed:
        read(upstream, 0, 512)
    assert failed.value.errno == errno.EIO
    assert time.monotonic() - begun > 0.5


def test_another_disk_in_its_place_is_not_used(disk: Disk) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=0)
        server.process.kill()
    disk.image.write_bytes(disk.content + bytes(512))
    with disk.served():
        with pytest.raises(OSError) as failed:
            read(upstream, 0, 512)
        assert failed.value.errno == errno.EIO
        assert "1048576" in str(failed.value)


def test_an_error_of_the_server_is_passed_on_and_the_connection_kept(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    failing = ("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=1.0")
    with nbdkit(*failing, f"error-file={trigger}", directory=tmp_path) as server:
        uri = parse_uri(server.uri())
        upstream = Upstream("disk", lambda timeout: connect(uri, timeout=timeout), patience=5)
        trigger.touch()
        with pytest.raises(OSError) as failed:
            read(upstream, 0, 512)
        assert failed.value.errno == errno.ENOSPC
        trigger.unlink()
        assert read(upstream, 0, 512) == bytes(512)
        upstream.close()


@pytest.mark.parametrize("flushed", [True, False])
def test_a_flush_fails_once_when_writes_may_have_been_lost_with_the_connection(
    disk: Disk, flushed: bool
) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=0)
        write(upstream, 0, b"acknowledged")
        if flushed:
            upstream.flush()
        server.process.kill()
    with disk.served():
        read(upstream, 0, 512)
        write(upstream, 512, b"later")
        if not flushed:
            with pytest.raises(OSError) as failed:
                upstream.flush()
            assert failed.value.errno == errno.EIO
        upstream.flush()
        upstream.close()


def test_durable_writes_leave_nothing_to_lose(disk: Disk) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=0, fate=Fate.LOST)
        upstream.change(True, Client.start_write, 0, b"durable", CommandFlags.FUA)
        server.process.kill()
    with disk.served():
        upstream.flush()
        assert read(upstream, 0, 7) == b"durable"
        upstream.close()


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.SAFE])
def test_nothing_is_served_any_more_when_acknowledged_writes_are_certainly_lost(
    disk: Disk, fate: Fate
) -> None:
    with disk.served() as server:
        upstream = disk.upstream(patience=0, fate=fate)
        write(upstream, 0, b"acknowledged")
        server.process.kill()
    with disk.served():
        if fate is Fate.SAFE:
            assert read(upstream, 0, 12) == b"acknowledged"
            upstream.flush()
        else:
            for _ in range(2):
                with pytest.raises(OSError, match="lost") as failed:
                    read(upstream, 0, 12)
                assert failed.value.errno == errno.EIO
        upstream.close()


@pytest.mark.parametrize(("mode", "count"), [("emulate", 3), ("disable", 1)])
def test_several_connections_are_used_only_where_they_see_one_another(
    tmp_path: Path, mode: str, count: int
) -> None:
    dialled: list[Client] = []
    options = ["--filter=multi-conn", "memory", "1M", f"multi-conn-mode={mode}"]
    with nbdkit(*options, directory=tmp_path) as server:

        def dial(timeout: float) -> Client:
            dialled.append(connect(parse_uri(server.uri()), timeout=timeout))
            return dialled[-1]

        upstream = Upstream("disk", dial, connections=3)
        for _ in range(6):
            assert read(upstream, 0, 512) == bytes(512)
        upstream.close()
    assert len(dialled) == count


def test_a_server_that_is_not_there_at_first_is_a_connect_error(disk: Disk) -> None:
    with pytest.raises(ConnectError, match="No such file"):
        disk.upstream(patience=5)
