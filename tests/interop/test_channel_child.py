"""What QEMU has started, and what of it stays: its limits, and that it fences what it serves."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from nbdserve.channel.destination import Event
from tests.support.channels import Scene, resumed
from tests.support.processes import is_alive, run, wait_until


def write_to(disk: Path) -> str:
    """What a QEMU that opens the disk for writing is told; nothing where it may."""
    return run("qemu-io", "-f", "raw", "-c", "info", disk).stderr


def test_what_qemu_starts_may_have_as_many_descriptors_as_it_is_allowed(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Scene(tmp_path) as scene:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            sender = scene.send()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert resource.prlimit(sender.worker, resource.RLIMIT_NOFILE) == (before[1], before[1])


def test_no_qemu_writes_to_the_disks_once_the_guest_is_elsewhere_as_long_as_they_are_served(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path) as scene:
        sender = scene.send()
        scene.arrive().close()
        assert sender.end() == 1
        # It has not left: its QEMU must be able to take the disk back.
        assert write_to(scene.disk) == ""
        worker = scene.migrate().worker
        wait_until(lambda: "lock" in write_to(scene.disk), "the fence stands")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not is_alive(worker), "it is dead")
        wait_until(lambda: not scene.status.connected, "its loss is noticed")
        with resumed(scene) as again:
            scene.wait_for(Event.BACK)
            wait_until(lambda: "lock" in write_to(scene.disk), "the fence stands again")
            scene.destination.done(60.0)
            assert again.wait(60.0) == 0
        assert write_to(scene.disk) == ""


def test_a_disk_that_somebody_writes_to_is_not_fenced_and_that_is_told(tmp_path: Path) -> None:
    import subprocess

    with Scene(tmp_path) as scene:
        sender = scene.send()
        writer = subprocess.Popen(
            ["qemu-io", "-f", "raw", scene.disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(b"write 0 512\n")
            writer.stdin.flush()
            assert b"wrote 512" in writer.stdout.readline() + writer.stdout.readline()
            qemu = scene.arrive()
            sender.write(b"RAM")
            from tests.support.channels import LOADED

            qemu.sendall(LOADED)
            assert sender.read(len(LOADED)) == LOADED
            assert sender.end() == 0
            wait_until(lambda: "no fence: " in sender.log.read_text(), "it is told")
        finally:
            writer.kill()
            writer.communicate()
