"""Sources that answer strangely: cut off in the middle, with odd extents, odd errors, or with nothing."""

from __future__ import annotations

import errno
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from nbdserve.protocol.extents import Extent
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.inprocess import one_export, running
from tests.support.liar import Answer, Chunks, all_data, lying, whole
from tests.support.memory import MemoryBackend
from tests.support.overlays import LAYOUTS, Layout, make_overlay, overlay
from tests.support.processes import check, run, wait_until
from tests.support.servers import UnixAddress, nbdkit, nbdserve
from tests.support.wire import GREETING, IHAVEOPT, NBDMAGIC

SIZE = 8 * MIB
both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def cutting(near: Path, far: Path, seed: int) -> Iterator[list[int]]:
    """A relay that hangs up in the middle of an answer, again and again; where it did so, in bytes."""
    chance, cuts = random.Random(seed), list[int]()

    def pass_on(client: socket.socket) -> None:
        left = chance.randrange(1200 * KIB, 2500 * KIB)
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(str(far))
            requests = threading.Thread(target=pump, args=(client, server), daemon=True)
            requests.start()
            while left and (data := server.recv(min(left, 64 * KIB))):
                client.sendall(data)
                left -= len(data)
            if not left:
                cuts.append(left)
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)
            requests.join(120)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(near))
        listener.listen()
        threading.Thread(target=accept, args=(listener, pass_on), daemon=True).start()
        yield cuts
        listener.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass everything on until either end hangs up."""
    with suppress(OSError):
        while data := source.recv(64 * KIB):
            sink.sendall(data)


def accept(listener: socket.socket, serve: object) -> None:
    """A thread for each client."""
    assert callable(serve)
    with suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@both
def test_answers_that_are_cut_off_in_the_middle_are_never_kept(layout: Layout, tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    with ExitStack() as stack:
        server = stack.enter_context(nbdserve("--read-only", tmp_path / "disk", directory=tmp_path))
        assert isinstance(server.address, UnixAddress)
        near = tmp_path / "near.sock"
        cuts = stack.enter_context(cutting(near, server.address.path, seed=1))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, UnixAddress(near).uri())
        daemon = stack.enter_context(overlay(image, "--connections=2", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        for offset in range(0, SIZE, MIB):
            assert guest.read(offset + 512, 600 * KIB) == content[offset + 512 : offset + 512 + 600 * KIB]
        with daemon.monitor() as qmp:
            qmp.execute("block-stream", device="disk")
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == content
        assert cuts


class OddExtents(MemoryBackend):
    """A disk whose extents are true, and as odd as the protocol allows: tiny, unaligned, beyond the range."""

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Zeros in the third of four parts of each 100000 bytes, told in pieces of 1000 bytes."""
        for place in range(offset - offset % 1000, min(offset + 40_000, self.size), 1000):
            begin, end = max(place, offset), min(place + 1000, self.size)
            flags = 3 if 50_000 <= place % 100_000 < 75_000 else 0
            yield Extent(end - begin, flags)


@both
def test_odd_extents_of_a_source_mark_nothing_as_zeros_that_is_not(layout: Layout, tmp_path: Path) -> None:
    disk = OddExtents(2 * MIB)
    disk.content[:] = random_bytes(2 * MIB)
    for place in range(50_000, 2 * MIB, 100_000):
        stop = min(place + 25_000, 2 * MIB)
        disk.content[place:stop] = bytes(stop - place)
    with running(one_export(disk), tmp_path) as (_, address):
        image = make_overlay(tmp_path / "overlay", layout, 2 * MIB, address.uri())
        with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_for_status(phase="done")
            assert guest.read(0, 2 * MIB) == disk.content


class Moody(MemoryBackend):
    """A disk that fails every third read and every second question for extents, each with another error."""

    ERRORS = (
        errno.EIO,
        errno.EPERM,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EINVAL,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    )

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._reads = self._asked = 0

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Never without waiting."""
        return False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer, or with something else and fail."""
        self._reads += 1
        if self._reads % 3 == 0:
            buffer[:] = b"\xee" * len(buffer)
            raise OSError(self.ERRORS[self._reads // 3 % len(self.ERRORS)], "moody")
        super().read_into(offset, buffer)

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Data, or an error."""
        self._asked += 1
        if self._asked % 2:
            raise OSError(self.ERRORS[self._asked % len(self.ERRORS)], "moody")
        yield Extent(length, 0)


@both
def test_a_source_with_all_kinds_of_errors_gives_errors_or_the_truth(layout: Layout, tmp_path: Path) -> None:
    disk = Moody(SIZE)
    disk.content[:] = random_bytes(SIZE)
    with running(one_export(disk), tmp_path) as (_, address):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
        arguments = ["--reconnect-timeout=5"]
        with overlay(image, *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            chance, failed = random.Random(1), 0
            for _ in range(60):
                offset = chance.randrange(SIZE - 70 * KIB)
                length = chance.randrange(1, 70 * KIB)
                try:
                    assert guest.read(offset, length) == disk.content[offset : offset + length]
                except OSError:
                    failed += 1
            assert failed < 60
            with daemon.monitor() as qmp:
                qmp.execute("block-stream", device="disk")

                def is_done() -> bool:
                    phase = daemon.status()["phase"]
                    if phase == "failed":
                        qmp.execute("block-job-resume", device="disk")
                    return bool(phase == "done")

                wait_until(is_done, "the job comes to its end, failure by failure", 30.0, 0.05)
            assert guest.read(0, SIZE) == disk.content


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        GREETING.pack(NBDMAGIC, IHAVEOPT, 3),
        struct.pack(">QQ", NBDMAGIC, 1) * 99,
    ],
)
def test_a_peer_that_is_no_source_keeps_a_guest_waiting_no_longer_than_told(
    greeting: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "peer.sock"

    def greet(client: socket.socket) -> None:
        with suppress(OSError):
            client.sendall(greeting)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, args=(listener, greet), daemon=True).start()
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, UnixAddress(path).uri())
        with overlay(image, "--reconnect-timeout=1", directory=tmp_path) as daemon, daemon.guest() as guest:
            begun = time.monotonic()
            with pytest.raises(OSError) as failed:
                guest.read(0, 4 * KIB)
            assert failed.value.errno == errno.EIO
            assert time.monotonic() - begun < 45  # unless told otherwise it would be 60 s
            guest.write(0, bytes(4 * KIB))
            assert guest.read(0, 4 * KIB) == bytes(4 * KIB)
        listener.shutdown(socket.SHUT_RDWR)


def hanging_up(disk: bytes, offset: int, length: int) -> Chunks:
    """No reply: the server closes the connection."""
    raise EOFError


def hanging_up_on_the_second_half(disk: bytes, offset: int, length: int) -> Chunks:
    """The same, of some reads."""
    return whole(disk, offset, length) if offset + length <= SIZE // 2 else hanging_up(disk, offset, length)


@both
@pytest.mark.parametrize(
    ("read", "about", "local"),
    [(hanging_up_on_the_second_half, all_data, SIZE // 2), (whole, hanging_up, 0)],
    ids=["read", "block status"],
)
@pytest.mark.sampled(1)
def test_a_job_fails_whose_source_hangs_up_on_a_request_again_and_again(
    read: Answer, about: Answer, local: int, layout: Layout, tmp_path: Path
) -> None:
    content = random_bytes(SIZE)
    with ExitStack() as stack:
        liar, address = stack.enter_context(lying(content, tmp_path, read=read, about=about))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
        arguments = ["--stream", "--reconnect-timeout=1"]
        begun = time.monotonic()
        daemon = stack.enter_context(overlay(image, *arguments, directory=tmp_path))
        told = daemon.wait_for_status(phase="failed")
        assert "again and again, and nothing comes" in told["error"]
        assert told["local"] == local, "what can be had is here"
        assert liar.answered < 1000 * (time.monotonic() - begun), "it is not asked as often as it hangs up"
        with daemon.guest() as guest:
            assert guest.read(0, SIZE // 2) == content[: SIZE // 2]


def test_a_pause_is_heard_while_the_source_is_still_asked_for_its_zeros(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = ["--filter=log", "eval", f"get_size=echo {1 << 40}", "can_extents=exit 0"]
    slow += ["extents=sleep 0.1; echo $4 $3", "pread=exit 1", f"logfile={log}"]
    with nbdkit(*slow, directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", 1 << 40, server.uri())
        with overlay(image, "--stream", directory=tmp_path) as daemon, daemon.monitor() as qmp:

            def asked() -> int:
                return log.read_text().count("...Extents id")

            wait_until(asked, "the source is asked")
            qmp.execute("block-job-pause", device="stream")
            answers = [0]

            def has_stopped() -> bool:
                time.sleep(0.6)
                answers.append(asked())
                return answers[-1] == answers[-2]

            # What was asked for before is still answered; the whole disk would take two minutes.
            wait_until(has_stopped, "no more is asked")


@pytest.mark.skipif(run("strace", "-V").returncode != 0, reason="strace is not installed")
@both
def test_flush_and_fua_sync_the_files_before_they_are_acknowledged(layout: Layout, tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", SIZE)
    trace = tmp_path / "trace"
    with nbdkit("file", tmp_path / "disk", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        wrapper = ["strace", "-D", "-f", "-o", str(trace), "-e", "trace=fdatasync,fsync,sync_file_range"]
        with overlay(image, directory=tmp_path, wrapper=wrapper) as daemon:

            def syncs(command: str) -> int:
                before = trace.read_text().count("sync(")
                check("qemu-io", "-f", "raw", "-c", command, daemon.uri())
                wait_until(lambda: trace.read_text().count("sync(") > before, f"a sync after {command}", 5)
                return trace.read_text().count("sync(") - before

            assert syncs("write -f 0 4k") >= 1
            assert syncs("write 8k 4k") >= 1  # qemu-io flushes when it closes
            assert syncs("write -z -f 64k 64k") >= 1
