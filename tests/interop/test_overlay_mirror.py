"""``serve --mirror-writes`` and ``receive``: the other host has the guest's disk as of a moment ago."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nbdserve.protocol.constants import CommandFlags
from tests.support.disks import KIB, MIB, random_disk
from tests.support.mirrors import Receiver, disk_of, held, receiver, wait_until_followed
from tests.support.monitors import Qmp
from tests.support.overlays import NBD_OVERLAY, Daemon, Guest, make_overlay, overlay
from tests.support.processes import Argument, run, wait_until
from tests.support.servers import Server, UnixAddress, free_tcp_address, fresh_path, nbdserve
from tests.support.tls import Identities, secure

KILLS = int(os.environ.get("MIRROR_KILLS", "6"))
SIZE = 24 * MIB - 3 * 512
"""The last 4 KiB are not whole."""


@dataclass
class Hosts:
    """Host A with the old disk, its export and an empty mirror over it; host B with an overlay."""

    directory: Path
    server: Server
    old: bytes
    mirror: Path
    image: Path
    socket: Path

    @property
    def uri(self) -> str:
        """Where the mirror is received."""
        return UnixAddress(self.socket).uri()

    @contextmanager
    def receiving(self) -> Iterator[Receiver]:
        """Host A receives."""
        with receiver(self.mirror, self.socket, self.directory) as running:
            yield running

    @contextmanager
    def mirrored(self, *arguments: Argument) -> Iterator[Daemon]:
        """Host B serves the overlay, and mirrors it."""
        options = ("--mirror-writes", self.uri, *arguments)
        with overlay(self.image, *options, directory=self.directory) as daemon:
            yield daemon


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    old = random_disk(tmp_path / "disk", SIZE)
    with nbdserve("--read-only", "--format=raw", tmp_path / "disk", directory=tmp_path) as server:
        mirror = make_overlay(tmp_path / "mirror", "flat", SIZE, server.uri())
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        yield Hosts(tmp_path, server, old, mirror, image, fresh_path(tmp_path, "mirror", ".sock"))


@dataclass
class Model:
    """All that the disk has been, as changes one after the other."""

    content: bytearray
    changes: list[tuple[int, bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def change(self, offset: int, data: bytes) -> None:
        """The guest is about to make this change, or has been told that it was made."""
        self.changes.append((offset, data))

    def require_prefix(self, found: bytes, least: int) -> int:
        """The disk is as it was after ``least`` changes or more of them; returns after how many."""
        state = bytearray(self.content)
        for offset, data in self.changes[:least]:
            state[offset : offset + len(data)] = data
        number = least
        # Comparing whole disks is a memcmp; nearly all differ early or late.
        while state != found:
            assert number < len(self.changes), f"the mirror is no disk that there was after change {least}"
            offset, data = self.changes[number]
            state[offset : offset + len(data)] = data
            number += 1
        return number


class Writer:
    """A guest that changes its disk, one request after the other, and flushes now and then."""

    def __init__(self, guest: Guest, model: Model, seed: int) -> None:
        self._guest, self._model = guest, model
        self._chance = random.Random(seed)
        self._end = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def end(self) -> None:
        """Stop after the request that is under way, answered or not."""
        self._end.set()
        self.thread.join(120)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        chance = self._chance
        try:
            while not self._end.is_set():
                length = chance.choice([512, 4 * KIB, 4 * KIB, 12 * KIB, 68 * KIB, 300 * KIB])
                offset = chance.randrange(0, SIZE - length, 512)
                if chance.random() < 0.7:
                    offset -= offset % (4 * KIB)
                flags = CommandFlags.FUA if chance.random() < 0.05 else CommandFlags(0)
                if chance.random() < 0.2:
                    self._model.change(offset, bytes(length))
                    self._guest.zero(offset, length, flags)
                else:
                    data = chance.randbytes(length)
                    self._model.change(offset, data)
                    self._guest.write(offset, data, flags)
                if chance.random() < 0.2:
                    self._guest.flush()
        except OSError:
            pass


def test_the_other_host_has_the_disk_and_the_old_one_stays_as_it_was(hosts: Hosts) -> None:
    with hosts.receiving(), hosts.mirrored("--armed") as daemon, daemon.guest() as guest:
        disk = bytearray(hosts.old)
        for offset, data in ((0, b"a" * 4096), (8192 + 512, b"b" * 512), (SIZE - 1024, b"c" * 1024)):
            guest.write(offset, data)
            disk[offset : offset + len(data)] = data
        guest.zero(MIB - 512, 3 * MIB)
        guest.trim(6 * MIB - 512, 64 * KIB)
        disk[MIB - 512 : 4 * MIB - 512] = bytes(3 * MIB)
        guest.flush()
        wait_until_followed(daemon)
        disk[6 * MIB - 512 : 6 * MIB + 64 * KIB - 512] = guest.read(6 * MIB - 512, 64 * KIB)
        told = daemon.status()["mirror"]
        assert (told["state"], told["lag"], told["lag-seconds"]) == ("in-sync", 0, 0)
        assert told["point"] >= 2
        assert abs(told["point-time"] - time.time()) < 600
        assert guest.read(0, SIZE) == disk
    shown = run(NBD_OVERLAY, "receive", "--finish", hosts.mirror)
    assert shown.returncode == 0, shown
    assert "the disk as of" in shown.stdout, shown
    assert disk_of(hosts.mirror, hosts.old) == disk
    assert (hosts.directory / "disk").read_bytes() == hosts.old
    # It may also be brought into the old disk.
    hosts.server.process.terminate()
    committed = run(NBD_OVERLAY, "commit", hosts.mirror, hosts.directory / "disk")
    assert committed.returncode == 0, committed
    assert (hosts.directory / "disk").read_bytes() == disk


@pytest.mark.timeout(900 + 30 * KILLS)
def test_after_kill_9_of_either_side_at_any_moment_the_mirror_is_a_disk_that_there_was(hosts: Hosts) -> None:
    chance = random.Random(os.environ.get("MIRROR_SEED", "1"))
    model = Model(bytearray(hosts.old))
    least = 0
    for number in range(KILLS):
        with hosts.receiving() as receiving, hosts.mirrored("--mirror-queue=1M") as daemon:
            with daemon.guest() as guest:
                settle_last_change(guest, model)
                if chance.random() < 0.5:
                    guest.flush()
                    wait_until_followed(daemon)
                    least = len(model.changes)
                writer = Writer(guest, model, chance.randrange(1 << 30))
                time.sleep(chance.random() * 0.6)
                victims = [(receiving.process,), (daemon.process,), (receiving.process, daemon.process)]
                for process in victims[number % 3]:
                    process.kill()
                if daemon.process.running:
                    time.sleep(chance.random() * 0.2)
                    daemon.process.kill()
                writer.end()
            if receiving.process.running:
                receiving.process.kill()
        least = model.require_prefix(held(hosts.mirror, hosts.old, hosts.directory), least)
    with hosts.receiving(), hosts.mirrored() as daemon, daemon.guest() as guest:
        settle_last_change(guest, model)
        wait_until_followed(daemon)
        disk = guest.read(0, SIZE)
    assert held(hosts.mirror, hosts.old, hosts.directory) == disk
    assert len(model.changes) > 10 * KILLS


def settle_last_change(guest: Guest, model: Model) -> None:
    """Nobody knows whether what was under way has happened: a guest's QEMU sends it again."""
    if model.changes:
        offset, data = model.changes[-1]
        guest.write(offset, data)


def test_a_guest_never_waits_for_a_mirror_that_is_away_and_that_catches_up(hosts: Hosts) -> None:
    with hosts.mirrored("--mirror-queue=1M") as daemon, daemon.guest() as guest:
        data = random.Random(3).randbytes(6 * MIB)
        guest.write(2 * MIB, data)
        guest.flush()
        told = daemon.status()["mirror"]
        assert told["state"] == "behind", told
        assert told["lag"] >= 6 * MIB, told
        assert told["trouble"], told
        with hosts.receiving() as receiving:
            wait_until_followed(daemon)
            receiving.process.freeze()
            began = time.monotonic()
            guest.write(9 * MIB, data)
            guest.flush()
            assert time.monotonic() - began < 60
            assert daemon.status()["mirror"]["lag"] > 0
            receiving.process.signal(signal.SIGCONT)
            wait_until_followed(daemon)
            disk = guest.read(0, SIZE)
    assert held(hosts.mirror, hosts.old, hosts.directory) == disk


def test_what_was_written_before_a_restart_is_sent_again_and_becomes_valid_at_once(hosts: Hosts) -> None:
    with hosts.mirrored() as daemon, daemon.guest() as guest:
        guest.write(MIB, b"x" * MIB)
        guest.write(3 * MIB, b"y" * MIB)
    with hosts.receiving(), hosts.mirrored() as daemon, daemon.guest() as guest:
        wait_until_followed(daemon)
        assert daemon.status()["mirror"]["points"] == 1
        disk = guest.read(0, SIZE)
    assert held(hosts.mirror, hosts.old, hosts.directory) == disk


def test_the_mirror_follows_while_the_disk_streams_and_when_it_is_complete(hosts: Hosts) -> None:
    with hosts.receiving(), hosts.mirrored("--stream") as daemon, daemon.guest() as guest:
        model = Model(bytearray(hosts.old))
        writer = Writer(guest, model, 4)
        daemon.wait_for_status(complete=True)
        time.sleep(0.2)
        writer.end()
        guest.flush()
        wait_until_followed(daemon)
        disk = guest.read(0, SIZE)
    assert held(hosts.mirror, hosts.old, hosts.directory) == disk
    # Now nobody knows what of it the guest has written.
    with hosts.mirrored() as daemon, daemon.guest() as guest:
        assert guest.read(0, SIZE) == disk
        assert daemon.status()["mirror"] is None
        assert "is not mirrored any more" in daemon.log.read_text()


def test_another_disks_mirror_is_refused_and_the_guest_goes_on(hosts: Hosts) -> None:
    other = make_overlay(hosts.directory / "other", "flat", SIZE, hosts.server.uri())
    smaller = make_overlay(hosts.directory / "smaller", "flat", SIZE - 512, hosts.server.uri())
    with hosts.receiving():
        with hosts.mirrored() as daemon, daemon.guest() as guest:
            guest.write(0, b"a" * 4096)
            wait_until_followed(daemon)
        require_refused(hosts, other, "the mirror of another overlay")
        require_refused(hosts, smaller, "no mirror of it")
    assert held(hosts.mirror, hosts.old, hosts.directory)[:4096] == b"a" * 4096


def require_refused(hosts: Hosts, image: Path, why: str) -> None:
    """The mirror is not this image's, and says so; its guest writes all the same."""

    def is_refused() -> bool:
        told = qmp.execute("query-overlay")["mirror"]
        return told["state"] == "lost" and why in told["trouble"]

    with (
        overlay(image, "--mirror-writes", hosts.uri, directory=hosts.directory) as daemon,
        daemon.guest() as guest,
        daemon.monitor() as qmp,
    ):
        guest.write(0, b"b" * 4096)
        wait_until(is_refused, why)


def test_writes_go_to_the_mirror_over_tls_and_come_again_where_the_receiver_was_killed(hosts: Hosts) -> None:
    (hosts.directory / "tls").mkdir()
    identities = Identities.create(hosts.directory / "tls")
    options = ("--tls-require", "--tls-verify-peer", f"--tls-certificates={identities.server}")
    at = free_tcp_address()
    with (
        hosts.receiving() as receiving,
        nbdserve(*options, hosts.uri, directory=hosts.directory, at=at) as front,
        overlay(
            hosts.image, "--mirror-writes", secure(front, identities.client), directory=hosts.directory
        ) as daemon,
        daemon.guest() as guest,
    ):
        data = random.Random(5).randbytes(3 * MIB)
        guest.write(MIB, data)
        guest.flush()
        wait_until_followed(daemon)
        # What the proxy had passed on is lost with the receiver, and comes again.
        guest.write(5 * MIB, data)
        receiving.process.kill()
        with hosts.receiving():
            guest.write(9 * MIB, data)
            guest.flush()
            wait_until_followed(daemon)
        disk = guest.read(0, SIZE)
    assert held(hosts.mirror, hosts.old, hosts.directory) == disk


def mirror_event(qmp: Qmp) -> dict[str, Any]:
    """What is told of the mirror next; that it is not there from the beginning does not count."""
    while True:
        event = qmp.event()
        if event["event"] == "OVERLAY_MIRROR" and "No such file" not in event["data"].get("reason", ""):
            data: dict[str, Any] = event["data"]
            return data


def test_the_monitor_tells_when_the_mirror_falls_behind_and_follows_again(hosts: Hosts) -> None:
    with hosts.mirrored() as daemon, daemon.monitor() as qmp, daemon.guest() as guest:
        with hosts.receiving() as receiving:
            assert mirror_event(qmp) == {"state": "in-sync"}
            receiving.process.kill()
        guest.write(0, b"a" * 4096)
        guest.flush()
        told = mirror_event(qmp)
        assert told["state"] == "behind"
        assert told["reason"]


def test_a_mirror_is_no_disk_until_its_log_is_applied(hosts: Hosts) -> None:
    with hosts.receiving(), hosts.mirrored() as daemon, daemon.guest() as guest:
        guest.write(0, b"a" * 4096)
        guest.flush()
        wait_until_followed(daemon)
        shown = run(NBD_OVERLAY, "info", "-U", hosts.mirror)
        assert shown.returncode == 0, shown
        assert "mirror: " in shown.stdout, shown
    shown = run(NBD_OVERLAY, "info", hosts.mirror)
    assert shown.returncode == 0, shown
    assert "mirror: the disk as of" in shown.stdout, shown
    for word in ("map", "verify"):
        refused = run(NBD_OVERLAY, word, hosts.mirror)
        assert refused.returncode == 1, refused
        assert "receive --finish" in refused.stderr, refused
    refused = run(NBD_OVERLAY, "commit", hosts.mirror, hosts.directory / "disk")
    assert refused.returncode == 1, refused
    assert "receive --finish" in refused.stderr, refused
    Path(f"{hosts.mirror}.redo").rename(hosts.directory / "away")
    refused = run(NBD_OVERLAY, "receive", "--finish", hosts.mirror)
    assert refused.returncode == 1, refused
    assert "is missing" in refused.stderr, refused
    (hosts.directory / "away").rename(f"{hosts.mirror}.redo")
    # Who serves it as a disk applies it; then it is no mirror any more.
    with overlay(hosts.mirror, directory=hosts.directory) as daemon, daemon.guest() as guest:
        assert guest.read(0, 8192) == b"a" * 4096 + hosts.old[4096:8192]
    assert not Path(f"{hosts.mirror}.redo").exists()
    refused = run(NBD_OVERLAY, "receive", "--socket", hosts.socket, hosts.mirror)
    assert refused.returncode == 1, refused
    assert "is no mirror" in refused.stderr, refused


def test_what_makes_no_sense_is_refused_in_one_line(hosts: Hosts) -> None:
    qed = make_overlay(hosts.directory / "qed", "qed", SIZE, hosts.server.uri())
    socket = hosts.directory / "s"
    for words, code, why in (
        (("serve", qed, "-k", socket, "--mirror-writes", hosts.uri), 1, "use the flat layout"),
        (("serve", hosts.image, "-k", socket, "--mirror-queue=2M"), 2, "is for --mirror-writes"),
        (
            ("serve", hosts.image, "-k", socket, "--mirror-writes", hosts.uri, "--mirror-queue=9"),
            2,
            "1M at least",
        ),
        (("serve", hosts.image, "-k", socket, "--mirror-writes", "http://a"), 2, "http://a"),
        (("receive", hosts.mirror), 2, "--socket"),
        (("receive", "--finish", hosts.image), 1, "it is no mirror"),
        (("receive", "--finish", "-k", socket, hosts.image), 2, "leave out --socket"),
    ):
        refused = run(NBD_OVERLAY, *words)
        assert (refused.returncode, refused.stderr.count("\n")) == (code, 1), refused
        assert why in refused.stderr, refused
