"""Threads that fail inside, of whatever it is: nobody waits for ever, and somebody is told."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdserve.client import Client, Upstream, connect, pipeline
from nbdserve.common.uri import parse_uri
from overlay.backing import server as source_module
from overlay.backing.failover import Sources
from overlay.backing.server import Source
from overlay.fill.checkpoint import Checkpoints
from overlay.fill.fetch import Fetcher
from overlay.fill.job import Job, Phase
from overlay.fill.streamer import Streamer
from overlay.formats.image import Image
from overlay.formats.open import open_image
from tests.support.disks import KIB, MIB, random_bytes
from tests.support.inprocess import one_export, running
from tests.support.memory import MemoryBackend
from tests.support.overlays import LAYOUTS, NBD_OVERLAY, NONE, Layout, make_overlay, overlay
from tests.support.processes import run, wait_until
from tests.support.servers import nbdkit

SIZE = 4 * MIB
FAILURES = [
    MemoryError(),
    RuntimeError("a bug"),
    KeyError(7),
    OSError(errno.ENOSPC, "No space left on device"),
]
both = pytest.mark.parametrize("layout", LAYOUTS)
anything = pytest.mark.parametrize("failure", FAILURES, ids=repr)


@dataclass
class Parts:
    """An image being streamed, without a daemon around it."""

    image: Image
    sources: Sources
    fetcher: Fetcher
    job: Job
    streamer: Streamer
    content: bytes


@contextmanager
def parts(layout: Layout, directory: Path) -> Iterator[Parts]:
    """Everything, connected and ready to stream."""
    disk = MemoryBackend(SIZE)
    disk.content[:] = random_bytes(SIZE // 2) + bytes(SIZE // 2)
    with running(one_export(disk), directory) as (_, address):
        path = make_overlay(directory / "overlay", layout, SIZE, address.uri())
        image = open_image(path, writable=True, layout=layout)
        sources = Sources([parse_uri(address.uri())], SIZE, patience=20.0)
        fetcher, job = Fetcher(image, sources), Job()
        streamer = Streamer(image, sources, fetcher, job, lambda: None)
        sources.start()
        streamer.start()
        try:
            yield Parts(image, sources, fetcher, job, streamer, bytes(disk.content))
        finally:
            fetcher.close()
            sources.close()
            streamer.close()
            image.close()


def failing_once(work: Callable[..., object], failure: Exception) -> Callable[..., object]:
    """A function that fails at its second call, and no other."""
    calls = [0]

    def wrapped(*arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            raise failure
        return work(*arguments, **named)

    return wrapped


@both
@anything
@pytest.mark.parametrize("where", ["fill", "fill_zero", "runs", "is_local"])
@pytest.mark.sampled(8)
def test_a_job_whose_thread_fails_inside_has_failed_and_can_be_resumed(
    where: str, failure: Exception, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with parts(layout, tmp_path) as it:
        told: list[Phase] = []
        it.job.tell = told.append
        monkeypatch.setattr(it.image, where, failing_once(getattr(it.image, where), failure))
        it.job.start("stream")
        wait_until(lambda: it.job.phase is not Phase.RUNNING, "it has ended", 20)
        if it.job.phase is Phase.FAILED:  # a function that is called but once does not fail
            expected = failure.strerror if isinstance(failure, OSError) else repr(failure)
            assert str(expected) in (it.job.error or "")
            assert told == [Phase.RUNNING, Phase.FAILED]
            assert it.fetcher.claims.idle, "nothing is held that others wait for"
            it.job.resume()
        wait_until(lambda: it.job.phase is Phase.DONE, "everything is here", 20)
        assert it.image.read(0, SIZE) == it.content


def test_who_listens_to_a_job_cannot_stop_it(tmp_path: Path) -> None:
    def fail(phase: Phase) -> None:
        raise RuntimeError("a listener's bug")

    with parts("flat", tmp_path) as it:
        it.job.tell = fail
        it.job.start("stream")
        wait_until(lambda: it.job.phase is Phase.DONE, "everything is here", 20)


WITHOUT_MEMORY = """
import sys
from overlay.fill.fetch import Fetcher
def fail(*arguments):
    raise MemoryError
Fetcher.store = fail
from overlay.cli.main import main
sys.exit(main())
"""


def test_wait_ends_with_1_and_the_reason_when_no_memory_is_left_for_streaming(tmp_path: Path) -> None:
    with nbdkit("memory", "4M", directory=tmp_path) as server:
        with connect(parse_uri(server.uri())) as client:
            client.start_write(0, random_bytes(MIB), NONE).result(10)
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        program = [sys.executable, "-c", WITHOUT_MEMORY]
        with overlay(image, directory=tmp_path, program=program) as daemon:
            monitor = f"--qmp=unix:{daemon.qmp_path}"
            assert run(NBD_OVERLAY, "stream", monitor).returncode == 0
            done = run(NBD_OVERLAY, "wait", monitor)
            assert done.returncode == 1
            assert "MemoryError" in done.stderr.splitlines()[-1]
            # Guests are told, too, each by its own request.
            with daemon.guest() as guest:
                for _ in range(2):
                    with pytest.raises(OSError) as failed:
                        guest.read(512 * KIB, 8 * KIB)
                    assert failed.value.errno == errno.ENOMEM


@anything
def test_reading_ahead_goes_on_after_it_has_failed(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with parts("flat", tmp_path) as it:
        fill, failed = it.image.fill, threading.Event()

        def fail(offset: int, data: memoryview, asked_at: int | None = None) -> int:
            if threading.current_thread().name == "read-ahead" and not failed.is_set():
                failed.set()
                raise failure
            return fill(offset, data, asked_at)

        def read_on() -> None:
            """Who reads on finds some of it read ahead, unless the guest is always quicker."""
            it.image.invalidate([(0, SIZE)])
            for offset in range(0, SIZE, 64 * KIB):
                it.fetcher.bring(offset, 64 * KIB)

        def has_failed() -> bool:
            read_on()
            return failed.is_set()

        def goes_on() -> bool:
            read_on()
            return it.fetcher.fetched.ahead > before

        monkeypatch.setattr(it.image, "fill", fail)
        wait_until(has_failed, "reading ahead has failed", 20)
        wait_until(lambda: it.fetcher.claims.idle, "nothing is held")
        before = it.fetcher.fetched.ahead
        wait_until(goes_on, "something was read ahead again", 20)
        read_on()
        assert it.image.read(0, SIZE) == it.content


@anything
def test_a_guest_that_is_refused_before_it_fetches_keeps_nobody_else_waiting(
    failure: Exception, tmp_path: Path
) -> None:
    with parts("flat", tmp_path) as it:
        on_miss = it.fetcher.on_miss

        def fail(offset: int, length: int) -> None:
            it.fetcher.on_miss = on_miss
            raise failure

        it.fetcher.on_miss = fail
        with pytest.raises(type(failure)):
            it.fetcher.bring(0, 64 * KIB)
        assert it.fetcher.claims.idle, "nothing is held that others wait for"
        it.fetcher.bring(0, 64 * KIB)
        assert it.image.read(0, 64 * KIB) == it.content[: 64 * KIB]


def test_many_readers_at_once_have_one_thread_that_reads_ahead(tmp_path: Path) -> None:
    with parts("flat", tmp_path) as it:

        def read(number: int) -> None:
            for offset in range(number * 512 * KIB, (number + 1) * 512 * KIB, 64 * KIB):
                it.fetcher.bring(offset, 64 * KIB)

        readers = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [thread.name for thread in threading.enumerate()].count("read-ahead") == 1


@anything
def test_flushing_now_and_then_goes_on_after_it_has_failed(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with parts("flat", tmp_path) as it:
        flushed: list[int] = []

        def flush() -> None:
            flushed.append(it.image.local_bytes)
            if len(flushed) == 1:
                raise failure

        monkeypatch.setattr(it.image, "flush", flush)
        looks: list[None] = []
        monkeypatch.setattr(it.image, "tidy", lambda: looks.append(None))
        checkpoints = Checkpoints(it.image, interval=0.05)
        checkpoints.start()
        wait_until(lambda: len(looks) >= 2, "it has looked for the first time")
        it.fetcher.bring(0, 64 * KIB)
        wait_until(lambda: len(flushed) >= 2, "it was tried again", 10)
        checkpoints.close()


@anything
def test_a_source_whose_thread_fails_inside_says_so_and_connects_again(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken = threading.Event()

    def dial(*arguments: Any, **named: Any) -> Client:
        if is_broken.is_set():
            raise failure
        return connect(*arguments, **named)

    monkeypatch.setattr(source_module, "connect", dial)
    with parts("flat", tmp_path) as it:
        it.sources.wait(20.0)
        is_broken.set()
        it.sources.session().source.lost(it.sources.session())
        expected = failure.strerror if isinstance(failure, OSError) else repr(failure)

        def is_told() -> bool:
            return str(expected) in (it.sources.health()[0].trouble or "")

        wait_until(is_told, "it is told", 20)
        is_broken.clear()
        wait_until(lambda: it.sources.connected, "it is connected again", 20)


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("a bug")], ids=repr)
def test_a_connection_whose_thread_fails_inside_ends_what_is_under_way(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delayed = ["--filter=delay", "memory", "1M", "rdelay=30"]
    with nbdkit(*delayed, directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        client.start_read(0, memoryview(bytearray(512)))

        def fail(*arguments: object) -> bool:
            raise failure

        monkeypatch.setattr(pipeline, "drive_once", fail)
        future = client.start_read(512, memoryview(bytearray(512)))
        with pytest.raises(OSError, match="its thread has failed") as failed:
            future.result(20)
        assert failed.value.errno == errno.ENOTCONN
        assert not client.connected


def test_a_source_that_is_closed_while_it_connects_leaves_no_connection_behind(tmp_path: Path) -> None:
    disk = MemoryBackend(MIB)
    with running(one_export(disk), tmp_path) as (server, address):
        at_the_door, go_on = threading.Event(), threading.Event()

        def accept(session: object, waiting: object) -> None:
            at_the_door.set()
            assert go_on.wait(20)

        source = Source(parse_uri(address.uri()), 3, 10.0, accept, lambda: None, lambda source: False)
        source.start()
        assert at_the_door.wait(20)
        closing = threading.Thread(target=source.close)
        closing.start()
        wait_until(lambda: source._closed, "it is being closed")
        go_on.set()
        closing.join(20)
        assert source.session is None
        wait_until(lambda: not len(server.clients), "nobody is connected any more", 20)


def test_an_upstream_that_is_closed_while_it_connects_again_leaves_no_connection_behind(
    tmp_path: Path,
) -> None:
    disk = MemoryBackend(MIB)
    with running(one_export(disk), tmp_path) as (server, address):
        at_the_door, go_on = threading.Event(), threading.Event()
        dialled: list[Client] = []

        def dial(timeout: float) -> Client:
            dialled.append(connect(parse_uri(address.uri()), timeout=timeout))
            if len(dialled) == 2:
                at_the_door.set()
                assert go_on.wait(20)
            return dialled[-1]

        upstream = Upstream("disk", dial, patience=20.0)
        dialled[0].close()
        outcome: list[int | None] = []

        def read() -> None:
            try:
                upstream.call(Client.start_read, 0, memoryview(bytearray(512)))
            except OSError as error:
                outcome.append(error.errno)

        reader = threading.Thread(target=read)
        reader.start()
        assert at_the_door.wait(20)
        upstream.close()
        go_on.set()
        reader.join(20)
        assert outcome == [errno.EIO]
        assert not any(client.connected for client in dialled)
        wait_until(lambda: not len(server.clients), "nobody is connected any more", 20)


class Now:
    """What the module ``time`` is to one whose clock the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


def test_errors_of_a_source_count_less_the_longer_ago_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Now()
    monkeypatch.setattr(source_module, "time", clock)
    source = Source(
        parse_uri("nbd://192.0.2.1"), 1, 10.0, lambda *given: None, lambda: None, lambda source: False
    )
    fresh = source.rank
    source.failed()
    assert source.rank > fresh
    clock.now += 90
    assert source.rank == fresh, "one bad sector demotes nobody for good"
    for _ in range(50):
        source.failed()
    clock.now += 90
    assert source.rank > fresh, "many do for longer"
    clock.now += 600
    assert source.rank == fresh
    assert source.health().errors == 51, "what is counted for the operator stays"
