"""Sources on slow links and on slow disks: nothing fails while bytes move, or a server is given its time.

The disks are small, so that even so a test ends soon.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nbdserve.backends import nbd as nbd_backend
from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import CommandFlags
from overlay.backing.defaults import PATIENCE
from tests.support.disks import KIB, random_bytes, random_disk
from tests.support.overlays import (
    LAYOUTS,
    NBD_OVERLAY,
    Daemon,
    Layout,
    fetched_bytes,
    make_overlay,
    overlay,
    requests,
)
from tests.support.processes import Argument, check, wait_until
from tests.support.servers import nbdkit, nbdserve

SLOW = 120.0
"""Seconds that a test gives what takes up to half a minute on an idle machine."""


def slow(directory: Path, content: int, *options: str, first: Argument = "") -> list[Argument]:
    """The arguments of nbdkit for a disk of so many bytes behind filters, which logs what it is asked."""
    random_disk(directory / "disk", content)
    filters = ["--filter=log", *(f"--filter={name}" for name in options[0].split())]
    where: list[Argument] = ["file", directory / "disk", f"logfile={directory}/log", *options[1:]]
    return [*([first] if first else []), *filters, *where]


def took_one_connection_each(daemon: Daemon) -> None:
    """No connection was given up, and nothing asked for failed."""
    output = daemon.log.read_text()
    assert "lost" not in output, output
    assert "no answer" not in output, output
    assert "fails with" not in output, output


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (512 * KIB, ("rate", "rate=256K")),
        (1024 * KIB, ("rate", "connection-rate=256K")),
        (2048 * KIB, ("rate", "rate=1M")),
        (512 * KIB, ("rate", "rate=256K", "--no-sr")),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.sampled(1)
def test_a_disk_streams_over_a_slow_link_and_nothing_is_asked_for_twice(
    layout: Layout, size: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    """256 kbit/s and 1 Mbit/s; a whole MiB in one request, as it is asked for elsewhere, takes 32 and 8 s."""
    first = "--no-sr" if "--no-sr" in options else ""
    chosen = [option for option in options if option != "--no-sr"]
    with nbdkit(*slow(tmp_path, size, *chosen, first=first), directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", layout, size, server.uri())
        with overlay(image, "--stream", "--reconnect-timeout=1", directory=tmp_path) as daemon:
            seen: list[dict[str, Any]] = []

            def is_done() -> bool:
                seen.append(daemon.status())
                return bool(seen[-1]["complete"])

            wait_until(is_done, "everything is here", SLOW, 0.2)
            assert any(told["sources"][0]["slow"] for told in seen), "it is told"
            assert 0 < seen[-1]["sources"][0]["rate"] < 400_000
            took_one_connection_each(daemon)
            with daemon.guest() as guest:
                assert guest.read(0, size) == (tmp_path / "disk").read_bytes()
        assert fetched_bytes(tmp_path / "log") <= size + 64 * KIB
        assert median(asked.length for asked in requests(tmp_path / "log")) <= 256 * KIB


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_reads_of_guests_come_over_a_slow_link_and_short_ones_between_them(
    layout: Layout, tmp_path: Path
) -> None:
    size = 2048 * KIB
    rate = tmp_path / "rate"
    rate.write_text("512K")
    limited = slow(tmp_path, size, "rate", "rate=512K", f"rate-file={rate}")
    with nbdkit(*limited, directory=tmp_path) as server:
        content = (tmp_path / "disk").read_bytes()
        image = make_overlay(tmp_path / "overlay", layout, size, server.uri())
        with (
            overlay(image, "--reconnect-timeout=60", directory=tmp_path) as daemon,
            daemon.guest() as guest,
            daemon.guest() as other,
        ):
            # More than is asked for at once: of what is, nbdkit answers one or the other first.
            buffer = bytearray(1536 * KIB)
            long: Future[None] = guest.client.start_read(0, memoryview(buffer))
            wait_until(lambda: fetched_bytes(tmp_path / "log") > 0, "the long read is under way", SLOW)
            assert other.read(1920 * KIB, 4 * KIB) == content[1920 * KIB : 1924 * KIB]
            assert not long.done(), "a short read need not wait for a long one, which takes 24 s"
            rate.write_text("100M")
            long.result(SLOW)
            assert buffer == content[: 1536 * KIB]
            took_one_connection_each(daemon)


@pytest.mark.exhaustive
def test_verify_compares_over_a_slow_link(tmp_path: Path) -> None:
    size = 512 * KIB
    content = random_disk(tmp_path / "quick", size)
    with nbdkit("file", tmp_path / "quick", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", size + 4 * KIB, server.uri())
        (tmp_path / "quick").write_bytes(content + bytes(4 * KIB))
    (tmp_path / "disk").write_bytes(content + bytes(4 * KIB))
    with nbdkit("file", tmp_path / "disk", directory=tmp_path) as server:
        backing = f"--backing={server.uri()}"
        with overlay(image, backing, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, size) == content
    with nbdkit("--filter=rate", "file", tmp_path / "disk", "rate=256K", directory=tmp_path) as server:
        told = check(NBD_OVERLAY, "verify", "--backing", server.uri(), image, seconds=SLOW)
        assert told.startswith("no difference")


@pytest.mark.exhaustive
def test_nbdserve_passes_a_slow_export_on_in_short_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be silent for a minute; here for eight seconds, in which 256 kbit/s bring 256 KiB."""
    monkeypatch.setattr(nbd_backend, "SILENCE", 8.0)
    size = 384 * KIB
    with nbdkit(*slow(tmp_path, size, "rate", "rate=256K"), directory=tmp_path) as server:
        backend = nbd_backend.open_nbd(parse_uri(server.uri()), read_only=False, patience=0.0)
        buffer = bytearray(size)
        backend.read_into(0, memoryview(buffer))
        assert buffer == (tmp_path / "disk").read_bytes()
        new = random_bytes(size, seed=7)
        backend.write(0, new, fua=False)
        backend.flush()
        assert (tmp_path / "disk").read_bytes() == new
        backend.close()
    reads = [asked.offset for asked in requests(tmp_path / "log")]
    assert len(set(reads)) == len(reads), "nothing was asked for twice"


@pytest.mark.exhaustive
def test_one_slow_read_gets_the_operators_time_and_status_tells(tmp_path: Path) -> None:
    """A disk that takes 12 s, as one that has to spin up; also when it is compared after a restart."""
    size = 128 * KIB
    disk = slow(tmp_path, size, "delay", "rdelay=12")
    with nbdkit(*disk, directory=tmp_path) as server, ExitStack() as stack:
        content = (tmp_path / "disk").read_bytes()
        image = make_overlay(tmp_path / "overlay", "flat", size, server.uri())
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        buffer = bytearray(4 * KIB)
        reading = guest.client.start_read(0, memoryview(buffer))

        def is_told() -> bool:
            return "no answer for" in check(NBD_OVERLAY, "status", f"--qmp=unix:{daemon.qmp_path}")

        wait_until(lambda: fetched_bytes(tmp_path / "log") > 0, "the server was asked", SLOW)
        server.process.freeze()  # so that there is time to look
        wait_until(is_told, "status says that nothing comes", SLOW)
        assert daemon.status()["sources"][0]["quiet"] > 0
        server.process.signal(signal.SIGCONT)
        reading.result(SLOW)
        assert buffer == content[: 4 * KIB]
        took_one_connection_each(daemon)
        stack.close()
        # What was read is compared now before anything else is asked for.
        daemon = stack.enter_context(overlay(image, "--stream", directory=tmp_path))
        daemon.wait_for_status(SLOW, phase="done")
        took_one_connection_each(daemon)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("what", ["extents", "open"])
@pytest.mark.exhaustive
def test_a_server_that_is_slow_to_tell_of_its_disk_is_waited_for(what: str, tmp_path: Path) -> None:
    size = 64 * KIB
    with nbdkit(*slow(tmp_path, size, "delay", f"delay-{what}=12"), directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", size, server.uri())
        with overlay(image, "--stream", "--connections=1", directory=tmp_path) as daemon:
            daemon.wait_for_status(SLOW, phase="done")
            with daemon.guest() as guest:
                assert guest.read(0, size) == (tmp_path / "disk").read_bytes()


def test_by_default_guests_are_rather_kept_waiting_than_told_of_an_error() -> None:
    assert PATIENCE >= 300


def test_a_write_that_the_server_takes_slowly_is_not_given_up(tmp_path: Path) -> None:
    """The server reads from its socket by and by: what counts is that it does."""
    path = tmp_path / "slow.sock"
    random_disk(tmp_path / "disk", 2048 * KIB)
    with (
        nbdserve("-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        trickling(path, server.connect, 64 * KIB, 0.2),
        connect(parse_uri(f"nbd+unix:///?socket={path}"), silence=2.0) as client,
    ):
        data = random_bytes(2048 * KIB)
        client.start_write(0, data, CommandFlags(0)).result(SLOW)
        assert client.read(0, len(data)) == data


@contextmanager
def trickling(path: Path, connect: Callable[[], socket.socket], count: int, seconds: float) -> Iterator[None]:
    """A relay at a path that passes so many bytes at once on to a server, so many seconds apart."""

    def pump(source: socket.socket, sink: socket.socket, count: int, seconds: float) -> None:
        with suppress(OSError):
            while data := source.recv(count):
                sink.sendall(data)
                time.sleep(seconds)

    def relay() -> None:
        near, far = listener.accept()[0], connect()
        far.settimeout(None)
        threading.Thread(target=pump, args=(far, near, 1 << 20, 0.0), daemon=True).start()
        pump(near, far, count, seconds)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=relay, daemon=True).start()
        yield
