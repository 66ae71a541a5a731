"""A stream that cannot go on: the line names the true cause, and what it says to type is typed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.pasting import after, pasted_well
from tests.support.processes import Process, check, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, lives, monitor, scene
from tests.vm.test_migrate_finish import ENGINES, MIB, SECONDS, assert_finished

BAD_SECTORS = """
import errno
import os

preadv, splice = os.preadv, os.splice


def bad(fd, begin, length):
    there = os.path.exists({trigger!r}) and os.readlink(f"/proc/self/fd/{{fd}}").startswith({image!r})
    return there and begin < {end} and begin + length > {begin}


def bad_preadv(fd, buffers, offset, *flags):
    if bad(fd, offset, sum(map(len, buffers))):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(fd, buffers, offset, *flags)


def bad_splice(source, target, count, offset_src=None, **others):
    if offset_src is not None and bad(source, offset_src, count):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return splice(source, target, count, offset_src=offset_src, **others)


os.preadv, os.splice = bad_preadv, bad_splice
"""


def last_line(run: Process, code: int = 1) -> str:
    """What it said last; it must end with this code."""
    assert run.wait(SECONDS) == code, run.output()
    return run.output().splitlines()[-1]


def tools(directory: Path, name: str, script: str) -> str:
    """A directory in which this command is a script instead, and the others are what they are."""
    directory.mkdir(parents=True)
    for command in ("nbdserve", "nbd-overlay", "nbd-migrate"):
        real = NBD_MIGRATE.with_name(command)
        if command == name:
            (directory / command).write_text(f"#!/bin/bash\n{script.format(real=real)}\n")
            (directory / command).chmod(0o755)
        else:
            (directory / command).symlink_to(real)
    return str(directory)


def with_bad_sectors(stage: Scene, there: Path) -> Path:
    """Have A's server find some as soon as there is the file that is returned."""
    trigger, code = there / "bad", there / "lib" / "sitecustomize.py"
    code.parent.mkdir(parents=True)
    place = {"begin": 40 * MIB, "end": 40 * MIB + 4096}
    code.write_text(BAD_SECTORS.format(trigger=str(trigger), image=str(stage.image), **place))
    bin_ = tools(there / "bin", "nbdserve", f'PYTHONPATH={code.parent} exec {{real}} "$@"')
    stage.change("source", bin=bin_)
    return trigger


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_bad_sector_on_a_is_called_that(tmp_path: Path, engine: str) -> None:
    there, directory = tmp_path / "there", tmp_path / "scene"
    directory.mkdir()
    with scene(directory, engine) as stage:
        trigger = with_bad_sectors(stage, there)
        stage.change("limits", recover=30.0, reconnect_delay=1)
        trigger.touch()
        with stage.run() as run:
            last = last_line(run)
        assert f"{stage.away} on A" in last
        assert "cannot be read" in last
        assert "on A names the places that cannot be read" in last or "the server's log" in last
        assert "see that this runs on A" not in last
        trigger.unlink()
        pasted_well(after("then", last))
        assert_finished(stage)


def test_a_bad_sector_that_is_found_before_the_guest_goes_leaves_it_on_a(tmp_path: Path) -> None:
    there, directory = tmp_path / "there", tmp_path / "scene"
    directory.mkdir()
    with scene(directory) as stage:
        trigger = with_bad_sectors(stage, there)
        stage.change("destination", policy="hybrid")
        trigger.touch()
        with stage.run() as run:
            last = last_line(run)
        assert "the copying has stopped" in last
        assert last.endswith("the guest runs on A as before")
        stage.wait_until_guest_works("a")
        assert not stage.overlay.exists()
        assert stage.image.exists()


def test_monitors_that_answer_late_cost_only_time(tmp_path: Path) -> None:
    """Of B's QEMU, and of nbd-overlay, while the disk is streamed."""
    with scene(tmp_path) as stage:
        stage.change("limits", speed=8 * MIB)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            for role in (Role.B, Role.OVERLAY):
                (process,) = role.find(stage.directory)
                process.suspend()
                time.sleep(4.0)
                process.resume()
            assert run.wait(SECONDS) == 0, run.output()
        assert_finished(stage)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system in which B's disk has room, until somebody takes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    directory.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=120M", "tmpfs", directory)
    try:
        yield directory
    finally:
        check("umount", "--lazy", directory)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_full_disk_on_b_is_called_that(tmp_path: Path, engine: str) -> None:
    directory = tmp_path / "scene"
    directory.mkdir()
    with small_disk(tmp_path / "small") as small, scene(directory, engine) as stage:
        stage.overlay = small / stage.overlay.name
        stage.change("destination", image=str(stage.overlay))
        stage.change("limits", speed=8 * MIB)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            check("mount", "-o", "remount,size=24M", small)
            last = last_line(run)
        assert f"there is no space left for {stage.overlay} on B; make room; the guest on B" in last
        assert "bytes of the disk are still to come" in last
        assert "A: " not in last
        check("mount", "-o", "remount,size=120M", small)
        pasted_well(after("when there is room", last))
        assert_finished(stage)


def test_an_nbd_overlay_that_does_not_stay_is_called_that(tmp_path: Path) -> None:
    there, directory = tmp_path / "there", tmp_path / "scene"
    directory.mkdir()
    with scene(directory) as stage:
        refusal = tmp_path / "refuse"
        script = f'if [ -e {refusal} ]; then echo "no such luck" >&2; exit 3; fi; exec {{real}} "$@"'
        stage.change("destination", bin=tools(there / "bin", "nbd-overlay", script))
        stage.change("limits", speed=16 * MIB, reconnect_delay=1)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            refusal.touch()
            for process in Role.OVERLAY.find(stage.directory):
                process.kill()
            last = last_line(run)
        assert "nbd-overlay on B ended with code 3: no such luck; the guest on B" in last
        assert f"see in {stage.overlay}.overlay.log on B why" in last
        refusal.unlink()
        pasted_well(after("then", last))
        assert_finished(stage)


def test_an_nbd_overlay_that_dies_again_and_again_is_called_that(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB, reconnect_delay=1, restarts=0)
        with stage.run_doomed("PROGRESS", Role.OVERLAY) as run:
            last = last_line(run)
        assert "nbd-overlay has ended; the guest on B" in last
        pasted_well(after("then", last))
        assert_finished(stage)


def test_an_nbd_overlay_that_hangs_is_called_that(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB, reconnect_delay=1, command=4.0, stall=60.0)
        with stage.run_doomed("PROGRESS", Role.OVERLAY, number=signal.SIGSTOP) as run:
            last = last_line(run)
        assert "nbd-overlay did not answer" in last
        pasted_well(after("to kill it loses nothing that was written", last))
        pasted_well(after("then", last))
        assert_finished(stage)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_qemu_on_b_that_hangs_is_called_that(tmp_path: Path, engine: str) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=16 * MIB, reconnect_delay=1, command=4.0)
        with stage.run_doomed("PROGRESS", Role.B, number=signal.SIGSTOP) as run:
            last = last_line(run)
        assert "B's QEMU did not answer" in last
        for process in Role.B.find(stage.directory):
            process.send_signal(signal.SIGCONT)
        pasted_well(after("then", last))
        assert_finished(stage)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_hangs_is_not_told_to_run(tmp_path: Path, engine: str) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=16 * MIB, stall=1.5)
        with stage.run_doomed("PROGRESS", Role.SERVER, number=signal.SIGSTOP) as run:
            last = last_line(run)
        assert "the stream has not moved for 1.5 s; the guest on B" in last
        assert "see that this runs on A" not in last
        for process in Role.SERVER.find(stage.directory):
            process.send_signal(signal.SIGCONT)
        pasted_well(after("then", last))
        assert_finished(stage)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["plain", "a b", "it's", "two  spaces", "new\nline"])
def test_the_command_for_a_server_that_cannot_be_brought_back_can_be_pasted(
    tmp_path: Path, name: str
) -> None:
    """Through an ssh too, which gives its words to another shell."""
    directory = tmp_path / name
    directory.mkdir()
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\nshift\nset -o pipefail\ncat | bash -c "$*" | cat\n')
    ssh.chmod(0o755)
    with scene(directory, "qemu") as stage:
        stage.change("source", shell=(str(ssh), "a"), bin=str(NBD_MIGRATE.parent))
        stage.change("limits", speed=16 * MIB, reconnect_delay=1, restarts=0)
        with stage.run_doomed("PROGRESS", Role.SERVER) as run:
            last = last_line(run)
        pasted_well(after("see that this runs on A", last))
        (server,) = Role.SERVER.find(stage.directory)
        with monitor(stage.monitor_b) as b:
            wait_until(lambda: b.state in ("io-error", "running"), "B's QEMU answers", SECONDS)
        pasted_well(after("then", last))
        assert not lives(server.pid), "what was typed by hand is ended with the rest"
        assert_finished(stage)
