"""A real guest's RAM and disk over one connection: QEMU starts the source's end, and does not wait for it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.channel.destination import Event
from tests.support.channels import NBDSERVE, Scene
from tests.support.processes import Argument, Process, check, is_alive, listens, wait_until
from tests.support.vms import DEVICE, DISK_SIZE, QEMU, monitor
from tests.support.vms import Scene as Guest

SLOW = 16 << 10
"""Bytes of RAM a second: far too few for all of it while a test looks."""
OVERLAY = Path(sys.executable).with_name("nbd-overlay")


@contextlib.contextmanager
def backing(scene: Scene, path: Path) -> Iterator[None]:
    """A socket whose clients' connections become streams of the channel, as long as it is connected."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with contextlib.suppress(OSError):
                        scene.destination.adopt(client)

        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def hosts(directory: Path) -> Iterator[tuple[Guest, Scene, Process]]:
    """A guest on A, a QEMU that waits for it on B, on an overlay over what comes through the channel."""
    guest = Guest(directory)
    with contextlib.ExitStack() as stack:
        a = stack.enter_context(Process(guest.source_qemu(), directory / "a.log"))
        guest.wait_until_guest_works("a")
        place = directory / "channel"
        place.mkdir()
        scene = stack.enter_context(Scene(place, listens_for_qemu=False))
        stack.enter_context(backing(scene, directory / "backing"))
        uri = f"nbd+unix:///disk?socket={directory / 'backing'}"
        check(OVERLAY, "create", "--size", str(DISK_SIZE), "--backing", uri, guest.overlay)
        served: list[Argument] = [
            OVERLAY,
            "serve",
            guest.overlay,
            "-k",
            directory / "overlay",
            "--reconnect-timeout",
            "5",
        ]
        stack.enter_context(Process(served, directory / "overlay.log"))
        wait_until(lambda: listens(directory / "overlay"), "the overlay's socket")
        disk = f"driver=nbd,node-name=disk0,server.type=unix,server.path={directory / 'overlay'}"
        b = [*QEMU, *DEVICE, "-blockdev", disk, "-serial", f"file:{directory / 'b.serial'}",
             "-qmp", f"unix:{guest.monitor_b},server=on,wait=off",
             "-incoming", f"unix:{scene.incoming}"]  # fmt: skip
        stack.enter_context(Process(b, directory / "b.log"))
        wait_until(lambda: listens(scene.incoming), "B's QEMU waits", 30.0)
        yield guest, scene, a


def migrate(guest: Guest, scene: Scene, *capabilities: str) -> None:
    """Let QEMU start the source's end, and send slowly until the overlay has its disk."""
    wanted = [{"capability": each, "state": True} for each in ("events", "return-path", *capabilities)]
    log, pid = scene.directory / "qemu.log", scene.directory / "qemu.pid"
    options = scene.options("--log", log, "--pid-file", pid)
    options[options.index("--export") + 1] = f"disk={guest.image}"
    command = shlex.join(map(str, [NBDSERVE, "channel", *options]))
    with monitor(guest.monitor_b) as b:
        b.execute("migrate-set-capabilities", capabilities=wanted)
    with monitor(guest.monitor_a) as a:
        a.execute("migrate-set-capabilities", capabilities=wanted)
        a.execute("migrate-set-parameters", max_bandwidth=SLOW)
        a.execute("migrate", uri=f"exec:{command}")
    wait_until(lambda: scene.status.streams > 1, "the overlay reaches its disk")


def has_come_to(guest: Guest, *states: str) -> bool:
    """Whether A's migration is in one of these states."""
    with monitor(guest.monitor_a) as a:
        return a.execute("query-migrate").get("status") in states


@pytest.mark.representative
@pytest.mark.parametrize("post_copy", [False, True], ids=["precopy", "postcopy-ram"])
def test_a_guest_and_its_disk_go_over_one_connection_that_outlives_the_sources_qemu(
    post_copy: bool, tmp_path: Path
) -> None:
    with hosts(tmp_path) as (guest, scene, a):
        migrate(guest, scene, *(["postcopy-ram"] if post_copy else []))
        with monitor(guest.monitor_a) as source:
            if post_copy:
                source.execute("migrate-start-postcopy")
            source.execute("migrate-set-parameters", max_bandwidth=1 << 30)
        wait_until(lambda: has_come_to(guest, "completed", "failed"), "the end of the migration", 30.0, 0.1)
        assert has_come_to(guest, "completed")
        scene.wait_for(Event.RAM_LOADED)
        worker = int((scene.directory / "qemu.pid").read_text())
        os.kill(a.pid, signal.SIGKILL)
        a.wait()
        guest.wait_until_guest_works("b")
        assert is_alive(worker)
        assert scene.road is not None
        assert scene.road.passed == 1
        scene.road.cut()
        scene.wait_for(Event.BACK)
        guest.wait_until_guest_works("b")
        scene.destination.done(60.0)
        wait_until(lambda: not is_alive(worker), "the end of the source")


def test_a_connection_that_breaks_before_all_ram_has_gone_leaves_the_guest_at_the_source(
    tmp_path: Path,
) -> None:
    with hosts(tmp_path) as (guest, scene, _):
        migrate(guest, scene)
        scene.wait_for(Event.RAM_BEGUN)
        assert scene.road is not None
        scene.road.cut()
        wait_until(lambda: has_come_to(guest, "failed"), "the migration fails", 30.0, 0.1)
        guest.wait_until_guest_works("a")
        scene.wait_for(Event.RAM_FAILED)
        wait_until(lambda: not (scene.directory / "qemu.pid").exists(), "the end of the source")


def test_a_migration_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    with hosts(tmp_path) as (guest, scene, _):
        migrate(guest, scene)
        scene.wait_for(Event.RAM_BEGUN)
        worker = int((scene.directory / "qemu.pid").read_text())
        with monitor(guest.monitor_a) as a:
            a.execute("migrate_cancel")
        wait_until(lambda: has_come_to(guest, "cancelled"), "the migration is cancelled", 30.0, 0.1)
        guest.wait_until_guest_works("a")
        scene.wait_for(Event.RAM_FAILED)
        wait_until(lambda: not is_alive(worker), "the end of the source")
