"""nbdserve before another NBD server that dies, hangs or comes back, and clients that do not wait for it."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from tests.support.disks import MIB, random_disk
from tests.support.overlays import requests
from tests.support.processes import Argument, Process, wait_until
from tests.support.servers import UnixAddress, nbdkit, nbdserve


def connected(uri: str, *contexts: str) -> nbd.NBD:
    """A libnbd client that also sends what the server will refuse."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    for context in contexts:
        client.add_meta_context(context)
    client.connect_uri(uri)
    return client


def test_a_server_that_takes_its_time_to_answer_is_waited_for_at_the_start(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk.img", MIB)
    with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path) as upstream:
        upstream.process.signal(signal.SIGSTOP)
        # Longer than an attempt to reach a server that was lost may take.
        awake = threading.Timer(6, upstream.process.signal, [signal.SIGCONT])
        awake.start()
        with nbdserve(upstream.uri(), directory=tmp_path) as proxy:
            assert connected(proxy.uri()).pread(MIB, 0) == content
        awake.join()


@pytest.mark.parametrize("patience", ["0", "1"])
def test_without_its_server_everything_is_an_error_and_never_zeroes(tmp_path: Path, patience: str) -> None:
    at = UnixAddress(tmp_path / "upstream.sock")
    content = random_disk(tmp_path / "disk.img", MIB)
    with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path, at=at) as upstream:
        proxied = nbdserve(upstream.uri(), f"--reconnect-timeout={patience}", directory=tmp_path)
        with proxied as proxy:
            client = connected(proxy.uri(), "base:allocation")
            assert client.pread(512, 0) == content[:512]
            upstream.process.kill()
            requests: list[Callable[[], object]] = [
                lambda: client.pread(512, 0),
                lambda: client.pread(MIB, 0),
                lambda: client.pwrite(b"x" * 512, 0),
                lambda: client.flush(),
                lambda: client.block_status(MIB, 0, lambda *_: 0),
            ]
            for request in requests:
                with pytest.raises(nbd.Error) as failed:
                    request()
                assert failed.value.errnum == errno.EIO
            with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path, at=at):
                assert client.pread(MIB, 0) == content
                client.pwrite(b"x" * 512, 0)
                client.flush()
                client.shutdown()
            log = proxy.log.read_text()
            assert log.count("the connection is lost") == 1
            assert log.count("connected again") == 1


def test_a_copy_does_not_notice_that_its_server_was_replaced(tmp_path: Path) -> None:
    at = UnixAddress(tmp_path / "upstream.sock")
    content = random_disk(tmp_path / "disk.img", 24 * MIB)
    log = tmp_path / "requests"
    slow: list[Argument] = ["--filter=log", "--filter=delay", "file", tmp_path / "disk.img", "--threads=4"]
    slow += [f"logfile={log}", "delay-read=200ms"]
    with (
        nbdkit(*slow, directory=tmp_path, at=at) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
        Process(
            ["nbdcopy", "--request-size=65536", proxy.uri(), tmp_path / "copy.img"], tmp_path / "nbdcopy.log"
        ) as copying,
    ):
        copying.wait_for(lambda: len(requests(log)) > 4, "the copy has begun")
        upstream.process.kill()
        assert copying.running, "the copy was faster than the test"
        at.path.unlink()
        with nbdserve("-f", "raw", "-r", tmp_path / "disk.img", directory=tmp_path, at=at):
            assert copying.wait(30) == 0, copying.output()
    assert (tmp_path / "copy.img").read_bytes() == content


def test_a_flush_fails_once_when_the_server_was_lost_with_unflushed_writes(tmp_path: Path) -> None:
    at = UnixAddress(tmp_path / "upstream.sock")
    random_disk(tmp_path / "disk.img", MIB)
    with (
        nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path, at=at) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.pwrite(b"x" * 512, 0)
        upstream.process.kill()
        with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path, at=at):
            with pytest.raises(nbd.Error) as failed:
                client.flush()
            assert failed.value.errnum == errno.EIO
            client.flush()
            client.shutdown()
            assert proxy.process.terminate() == 0


def test_a_server_that_hangs_stops_only_its_own_export(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk.img", MIB)
    with nbdkit("memory", "1M", directory=tmp_path) as upstream:
        exports = [f"--export=far={upstream.uri()}", f"--export=near={tmp_path}/disk.img,format=raw"]
        with nbdserve(*exports, "--reconnect-timeout=0", directory=tmp_path) as proxy:
            stuck = connected(proxy.uri("far"))
            near = connected(proxy.uri("near"))
            upstream.process.freeze()
            buffers = [nbd.Buffer(512) for _ in range(200)]
            for buffer in buffers:
                stuck.aio_pread(buffer, 0)
            stuck.poll(0)
            assert near.pread(MIB, 0) == content
            wait_until(lambda: len(os.listdir(f"/proc/{proxy.pid}/task")) > 64, "all its workers wait")
            near.pwrite(b"durable", 0, nbd.CMD_FLAG_FUA)
            flush = near.aio_flush()
            assert near.poll(60_000) == 1
            assert near.aio_command_completed(flush), (
                "a flush waits for a server that it has nothing to do with"
            )
            near.shutdown()
            upstream.process.signal(signal.SIGCONT)
            while stuck.aio_in_flight():
                assert stuck.poll(60_000) == 1
            assert all(bytes(buffer.to_bytearray()) == bytes(512) for buffer in buffers)
            stuck.shutdown()


def test_the_end_does_not_wait_for_a_server_that_hangs_when_nothing_is_owed_to_it(tmp_path: Path) -> None:
    with (
        nbdkit("memory", "1M", directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.pwrite(b"flushed", 0)
        client.flush()
        client.shutdown()
        upstream.process.freeze()
        assert proxy.process.terminate() == 0
        assert "may be lost" not in proxy.process.output()


@pytest.mark.exhaustive
def test_the_end_waits_no_longer_than_usual_for_a_server_that_hangs_and_says_what_may_be_lost(
    tmp_path: Path,
) -> None:
    with (
        nbdkit("memory", "1M", directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as idle,
        nbdserve(
            *(f"--export={name}={upstream.uri()}" for name in ("a", "b", "c")), directory=tmp_path
        ) as busy,
    ):
        clients = [connected(proxy.uri(name)) for proxy, name in ((idle, ""), (busy, "a"), (busy, "b"))]
        for client in clients:
            client.pwrite(b"unflushed", 0)
        upstream.process.freeze()
        clients.pop(0).shutdown()
        buffer = nbd.Buffer(512)
        for client in clients:
            client.aio_pread(buffer, 0)
            client.poll(0)
        for proxy in (idle, busy):
            proxy.process.signal(signal.SIGTERM)
        # To answer, and then to flush, each has 10 s at most; a request has 60 s.
        begun = time.monotonic()
        assert idle.process.wait() == 1
        assert busy.process.wait() == 1
        assert time.monotonic() - begun < 50
        for proxy, count in ((idle, 1), (busy, 2)):
            assert proxy.process.output().count("may be lost") == count, proxy.process.output()


def test_the_end_flushes_what_is_owed_to_the_server(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with (
        nbdkit("--filter=log", "memory", "1M", f"logfile={journal}", directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.pwrite(b"unflushed", 0)
        client.shutdown()
        assert "...Flush" not in journal.read_text()
        assert proxy.process.terminate() == 0
        assert "...Flush" in journal.read_text()


def test_a_client_that_goes_away_leaves_its_requests_behind_in_good_order(tmp_path: Path) -> None:
    slow = ["--filter=delay", "memory", "16M", "delay-write=100ms", "delay-read=100ms", "--threads=32"]
    with (
        nbdkit(*slow, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        for _ in range(5):
            client = connected(proxy.uri())
            for index in range(16):
                client.aio_pwrite(nbd.Buffer.from_bytearray(b"x" * 4096), index * 4096)
                client.aio_pread(nbd.Buffer(4096), index * 4096)
            client.poll(0)
            del client
        client = connected(proxy.uri())
        assert client.pread(512, MIB) == bytes(512)
        client.shutdown()
