"""QED images of every cluster and table size that are made here: read, written to in part, streamed."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import parse_uri
from overlay.backing.failover import Sources
from overlay.engine import Overlay
from overlay.fill.job import Job, Phase
from overlay.fill.streamer import Streamer
from overlay.formats.image import Backing
from overlay.formats.qed.create import create, new_header
from overlay.formats.qed.image import QedImage
from tests.support.disks import KIB, MIB, Run, sparse_disk
from tests.support.inprocess import one_export, running
from tests.support.memory import MemoryBackend
from tests.support.overlays import NBD_OVERLAY, overlay
from tests.support.processes import check, wait_until
from tests.support.servers import Server, UnixAddress, nbdkit, nbdserve

STEPS = 30


def is_made(cluster: int, table: int) -> bool:
    """Whether create makes images of these sizes."""
    try:
        return bool(new_header(MIB, None, cluster, table))
    except UsageError:
        return False


SIZES = [
    (cluster, table)
    for cluster in (4 * KIB << power for power in range(15))
    for table in (2, 4, 8, 16)
    if is_made(cluster, table)
]


class Model:
    """A guest of an overlay that knows what its disk must hold."""

    def __init__(self, disk: Overlay, content: bytearray, cluster: int, seed: int) -> None:
        self.disk, self.content, self.cluster = disk, content, cluster
        self.chance = random.Random(seed)

    def place(self) -> tuple[int, int]:
        """A range: within a cluster, over the edges of some, or up to the disk's end."""
        chance, size = self.chance, len(self.content)
        offset = chance.choice([chance.randrange(size), chance.randrange(size // 512) * 512])
        if chance.random() < 0.3:
            offset -= offset % self.cluster
        length = chance.choice([1, 512, 4 * KIB, self.cluster // 2, self.cluster, 2 * self.cluster + 512])
        return offset, max(1, min(length, size - offset))

    def step(self) -> None:
        """Do something, and see that it was done."""
        offset, length = self.place()
        end = offset + length
        match self.chance.choice(["read", "read", "write", "write", "zero"]):
            case "write":
                data = self.chance.randbytes(length)
                if not self.disk.write_now(offset, data):
                    self.disk.write(offset, data, fua=False)
                self.content[offset:end] = data
            case "zero":
                self.disk.zero(offset, length, fua=False, may_trim=True, fast=False)
                self.content[offset:end] = bytes(length)
        self.look(offset, length)

    def look(self, offset: int, length: int) -> None:
        """What a guest reads is what must be there."""
        buffer = bytearray(length)
        self.disk.read_into(offset, memoryview(buffer))
        assert buffer == self.content[offset : offset + length], f"{length} bytes at {offset}"


@pytest.mark.parametrize(("cluster", "table"), SIZES)
@pytest.mark.sampled(10)
def test_any_history_over_clusters_of_any_size_streams_to_a_whole_disk(
    cluster: int, table: int, tmp_path: Path
) -> None:
    size = 2 * max(cluster, 64 * KIB) + MIB + 1536  # the last cluster is cut off
    runs = [Run(offset, min(64 * KIB, size - offset), offset % 3 != 0) for offset in range(0, size, 64 * KIB)]
    content = bytearray(sparse_disk(tmp_path / "disk", runs))
    source = MemoryBackend(size)
    source.content[:] = content
    path = tmp_path / "overlay"
    with running(one_export(source), tmp_path) as (_, address):
        backing = Backing(address.uri(), raw=True)
        create(path, new_header(size, backing, cluster, table), backing)
        image = QedImage.open(path, writable=True)
        sources = Sources([parse_uri(address.uri())], image.size, patience=20.0)
        job, disk = Job(), Overlay(image, sources)
        streamer = Streamer(image, sources, disk.fetcher, job, lambda: None)
        sources.start()
        streamer.start()
        try:
            model = Model(disk, content, cluster, seed=cluster + table)
            for step in range(STEPS):
                if step == STEPS // 2:
                    job.start("stream")
                model.step()
            wait_until(lambda: job.phase is not Phase.RUNNING, "everything is here", 60)
            assert job.phase is Phase.DONE, job.error
            model.look(0, size)
        finally:
            streamer.close()
            disk.close()
    told = check(NBD_OVERLAY, "check", path)
    assert "no corruption found" in told
    with QedImage.open(path) as image:
        assert image.read(0, size) == content
        assert not image.backings


def test_an_image_of_the_largest_clusters_is_streamed_and_read_by_qemu(tmp_path: Path) -> None:
    """From the command line to QEMU's own reader, with a source whose answers are short."""
    size = 9 * MIB + 512
    content = sparse_disk(tmp_path / "disk", [Run(0, size, True)])
    path = tmp_path / "overlay"
    with nbdkit("file", tmp_path / "disk", directory=tmp_path) as server:
        made_so = ["--layout=qed", "--cluster-size=2M", "--backing", server.uri()]
        check(NBD_OVERLAY, "create", *made_so, path)
        with overlay(path, "--stream", directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.write(3 * MIB + 512, b"new" * 512)
            content = content[: 3 * MIB + 512] + b"new" * 512 + content[3 * MIB + 2048 :]
            daemon.wait_for_status(60, phase="done")
            assert guest.read(0, size) == content
    check("qemu-img", "convert", "-f", "qed", "-O", "raw", path, tmp_path / "converted")
    assert (tmp_path / "converted").read_bytes() == content


def test_what_has_come_of_a_cluster_is_not_asked_for_again_when_its_connection_was_lost(
    tmp_path: Path,
) -> None:
    """On a slow link, where little is under way at once; the second of two clusters is half there."""
    size = 4 * MIB
    content = sparse_disk(tmp_path / "disk", [Run(0, size, True)])
    near = tmp_path / "near.sock"
    with (
        nbdserve("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        cut_once(near, server, 3 * MIB) as passed,
    ):
        backing = Backing(UnixAddress(near).uri(), raw=True)
        create(tmp_path / "overlay", new_header(size, backing, 2 * MIB), backing)
        arguments = ["--stream", "--connections=1"]
        with overlay(tmp_path / "overlay", *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_for_status(60, phase="done")
            assert guest.read(0, size) == content
    assert len(passed) == 2, "the first connection was cut off"
    assert size < sum(passed) <= size + 600 * KIB


@contextmanager
def cut_once(near: Path, server: Server, count: int) -> Iterator[list[int]]:
    """A slow relay to a server, of which the first connection is cut off after so many bytes of answers.

    Yields how many each connection has passed on.
    """
    passed: list[int] = []

    def answer(source: socket.socket, sink: socket.socket, number: int, most: int) -> None:
        with suppress(OSError):
            while passed[number] < most and (data := source.recv(min(most - passed[number], 64 * KIB))):
                sink.sendall(data)
                passed[number] += len(data)
                time.sleep(0.15)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def ask(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(64 * KIB):
                sink.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, far = listener.accept()[0], server.connect()
                far.settimeout(None)
                passed.append(0)
                most = count if len(passed) == 1 else 1 << 60
                arguments = (far, client, len(passed) - 1, most)
                threading.Thread(target=answer, args=arguments, daemon=True).start()
                threading.Thread(target=ask, args=(client, far), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(near))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield passed
        listener.shutdown(socket.SHUT_RDWR)
