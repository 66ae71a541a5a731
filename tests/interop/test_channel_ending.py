"""How the ends of a channel part, and how what is not connected yet is ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from nbdserve.channel import destination
from nbdserve.channel.destination import Event
from nbdserve.channel.dialling import Attempt, Way
from nbdserve.channel.places import TcpPlace
from nbdserve.channel.terms import REQUESTS, Limits
from nbdserve.channel.wire.greeting import Claim, Mode
from tests.support.channels import LOADED, NBDSERVE, Scene, resumed
from tests.support.processes import is_alive, wait_until

SOON = 7.0
"""Seconds, fewer than the ten that a greeting may take."""


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_migration_that_is_broken_off_while_its_end_connects_ends_soon(silent: str, tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send_with(["--connect", silent, *scene.options()[2:]])
        worker = sender.worker
        # More than the pipe holds: a QEMU sees that it is to break off when all of this is written.
        sender.write(bytes(3 << 19))
        began = time.monotonic()
        assert sender.end() == 1
        assert time.monotonic() - began < SOON
        assert "QEMU has broken the migration off" in sender.errors
        wait_until(lambda: not is_alive(worker), "the worker's end")


def test_what_qemu_sends_before_the_connection_stands_arrives_whole(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        assert scene.road is not None
        scene.road.open.clear()
        sender = scene.send()
        ram = os.urandom(3 << 19)
        sender.write(ram)
        scene.road.open.set()
        qemu = scene.arrive()
        received = bytearray()
        while len(received) < len(ram):
            received += qemu.recv(1 << 20)
        assert received == ram
        qemu.sendall(LOADED)
        assert sender.read(len(LOADED)) == LOADED
        assert sender.end() == 0


@pytest.mark.parametrize("form", [["--resume"], ["--ram"]])
def test_a_signal_ends_a_source_that_connects_soon(form: list[str], silent: str, tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        more = [*form, f"unix:{tmp_path / 'ram'}"] if form == ["--ram"] else form
        words = ["--connect", silent, *scene.options()[2:], *more, "--verbose"]
        with subprocess.Popen(
            [NBDSERVE, "channel", *words], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        ) as source:
            places = Path(f"/proc/{source.pid}/fd")
            wait_until(lambda: _connects(places), "it connects", 20.0)
            began = time.monotonic()
            source.send_signal(signal.SIGTERM)
            _, errors = source.communicate(timeout=30.0)
        assert time.monotonic() - began < SOON
        assert source.returncode == (0 if "--ram" in more else 1)
        assert "Traceback" not in errors


def _connects(places: Path) -> bool:
    """Whether this process has a socket of TCP by now."""
    tcp = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    return any(os.readlink(each)[8:-1] in tcp for each in places.iterdir() if each.is_symlink())


def test_a_goodbye_that_is_lost_is_said_again(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        worker = scene.migrate().worker
        assert scene.road is not None
        scene.road.deafen()
        scene.destination.done(12.0)
        assert scene.events[-1] is Event.DONE
        wait_until(lambda: not is_alive(worker), "the worker's end")


def test_a_source_that_dies_when_it_is_needed_no_more_is_not_waited_for_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "_RETURN", 1.0)
    with Scene(tmp_path) as scene:
        worker = scene.migrate().worker
        assert scene.road is not None
        os.kill(worker, signal.SIGSTOP)
        scene.destination.say_done()
        os.kill(worker, signal.SIGKILL)
        scene.road.cut()
        scene.wait_for(Event.DONE)


def test_a_connection_that_is_half_open_keeps_no_other_out(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        worker = scene.migrate().worker
        assert scene.road is not None
        # Nothing goes either way any more, not even that who was there has ended.
        scene.road.open.clear()
        os.kill(worker, signal.SIGKILL)
        straight = ["--connect", f"127.0.0.1:{scene.port}"]
        began = time.monotonic()
        with resumed(scene, *straight):
            scene.wait_for(Event.BACK)
            assert time.monotonic() - began < scene.limits.silence
            assert scene.read_disk()


def test_no_epoch_that_is_claimed_keeps_a_later_source_out(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        worker = scene.migrate().worker
        way, offer = Way(TcpPlace("127.0.0.1", scene.port)), Limits().offer(REQUESTS)
        token = scene.token.read_bytes()
        for epoch in (1 << 63, (1 << 64) - 1):
            claim = partial(Claim, Mode.RESUME, epoch, offer)
            transport, answer = Attempt(way, token, claim, 20.0).result()
            assert answer.epoch == epoch
            transport.close()
        wait_until(lambda: not is_alive(worker), "who was replaced has ended")
        for number in (1, 2):
            with resumed(scene):
                scene.wait_for(Event.BACK, 2 + number)
                assert scene.read_disk()
