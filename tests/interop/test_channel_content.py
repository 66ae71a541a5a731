"""What goes over the channel arrives as it was sent: RAM in pieces of any size, and disks."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.support.channels import LOADED, Scene
from tests.support.tls import Authority

SENT = 96 << 20
"""Bytes of RAM: several windows."""
PERIOD = (1 << 20) + 7
"""Bytes after which it repeats; no multiple of a frame, so that one too many, or too few, is seen."""


@pytest.mark.parametrize("over_tls", [False, True])
def test_ram_arrives_as_it_was_sent_whatever_its_pieces_are_and_the_disk_beside_it(
    tmp_path: Path, over_tls: bool
) -> None:
    pattern = os.urandom(PERIOD)
    ram = pattern * 2
    authority = Authority.create(tmp_path / "ca")
    server, client = (authority.issue(tmp_path / role, role) for role in ("server", "client"))
    with Scene(tmp_path, tls=server if over_tls else None) as scene:
        sender = scene.send("--tls-certificates", client) if over_tls else scene.send()
        qemu = scene.arrive()

        def write() -> None:
            luck, at = random.Random(1), 0
            while at < SENT:
                length = min(SENT - at, luck.choice([1, 9, 4096, 32768, 65536, luck.randrange(1, 300_000)]))
                sender.write(ram[at % PERIOD : at % PERIOD + length])
                at += length

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        luck, at, reads = random.Random(2), 0, 0
        while at < SENT:
            received = qemu.recv(luck.choice([7, 4096, 1 << 20]))
            assert received == ram[at % PERIOD : at % PERIOD + len(received)], f"another byte behind {at}"
            at += len(received)
            if luck.random() < 0.05:
                # One that takes nothing for a moment.
                time.sleep(0.01)
                assert scene.read_disk()
                reads += 1
        writing.join(60.0)
        assert reads
        qemu.sendall(LOADED)
        assert sender.read(len(LOADED)) == LOADED
        assert sender.end() == 0
