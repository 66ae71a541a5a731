"""``nbd-overlay commit``: what a guest wrote in an overlay becomes part of the disk below, or none of it."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from nbdserve.exports.half_committed import mark, mark_of
from overlay.formats.flat.header import Flag, read_header
from overlay.formats.storage import open_file
from recipes.fencing.moving import put_away
from tests.support.disks import KIB, MIB, random_bytes, sparse_disk, sparse_runs
from tests.support.loops import loop_device
from tests.support.overlays import Daemon, Guest, make_overlay, overlay
from tests.support.processes import Argument, check, run
from tests.support.servers import UnixAddress, nbdkit, nbdserve, qemu_nbd

PROGRAM = Path(sys.executable).with_name("nbd-overlay")
SERVER = Path(sys.executable).with_name("nbdserve")
SIZE = 8 * MIB


@dataclass(frozen=True)
class Cut:
    """A disk, an overlay in which a guest has written to part of it, and what the guest's disk is now."""

    disk: Path
    image: Path
    old: bytes
    new: bytes

    def copy_to(self, directory: Path) -> Cut:
        """The same files elsewhere."""
        directory.mkdir()
        for path in (self.disk, self.image, Path(f"{self.image}.map")):
            check("cp", "--sparse=auto", path, directory)
        return replace(self, disk=directory / self.disk.name, image=directory / self.image.name)


def write_like_a_guest(guest: Guest, content: bytearray, first: bool = True) -> None:
    """Write, zero and trim here and there, and tell in ``content`` what the disk is by that."""
    places = [(512, 100), (3 * MIB + 4096, 64 * KIB), (5 * MIB, 1536 * KIB)]
    for number, (place, length) in enumerate(places if first else places[1:]):
        data = random_bytes(length // 512 * 512 or 512, number + 5)
        guest.write(place, data)
        content[place : place + len(data)] = data
    guest.zero(2 * MIB, 256 * KIB)
    guest.trim(7 * MIB, 512 * KIB)
    content[2 * MIB : 2 * MIB + 256 * KIB] = bytes(256 * KIB)
    content[7 * MIB : 7 * MIB + 512 * KIB] = bytes(512 * KIB)


@contextmanager
def guest_of(disk: Path, image: Path, directory: Path) -> Iterator[tuple[Guest, Daemon]]:
    """A guest on an overlay over a disk that is served, and the overlay's daemon."""
    with nbdserve("-r", "-fraw", disk, directory=directory) as server:
        if not image.exists():
            make_overlay(image, "flat", disk.stat().st_size, server.uri())
        backing = f"--backing={server.uri()}"
        with overlay(image, backing, directory=directory) as daemon, daemon.guest() as guest:
            yield guest, daemon


def cut(directory: Path, *, first: bool = True, name: str = "disk", seed: int = 0) -> Cut:
    """A disk whose guest has run on an overlay, and ended."""
    disk, image = directory / f"{name}.img", directory / f"{name}.flat"
    runs = sparse_runs(SIZE, 256 * KIB)
    old = sparse_disk(disk, runs, 1 + seed)
    content = bytearray(old)
    with guest_of(disk, image, directory) as (guest, _):
        guest.read(4 * MIB, 512 * KIB)
        write_like_a_guest(guest, content, first)
    return Cut(disk, image, old, bytes(content))


def refused(*words: Argument, wanted: str, code: int = 1) -> None:
    """The command says this in one line, and nothing else."""
    done = run(PROGRAM, "commit", *words)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stdout + done.stderr
    assert wanted in done.stderr, done.stderr


@pytest.mark.parametrize("first", [True, False], ids=["first grain written", "first grain only below"])
def test_what_the_guest_wrote_becomes_part_of_a_raw_file_and_nothing_else_is_written(
    first: bool, tmp_path: Path
) -> None:
    made = cut(tmp_path, first=first)
    told = json.loads(check(PROGRAM, "commit", "--json", made.image, made.disk))
    assert made.disk.read_bytes() == made.new
    assert [told[0][key] for key in ("size", "zeros", "was_committed")] == [SIZE, 768 * KIB, False]
    # The first grain is no part of this: it is written in the last step.
    assert told[0]["data"] == 64 * KIB + 1536 * KIB


def test_the_overlay_is_of_no_use_afterwards_and_its_removal_is_told(tmp_path: Path) -> None:
    made = cut(tmp_path)
    assert "it is the guest's disk" in check(PROGRAM, "commit", made.image, made.disk)
    done = run(PROGRAM, "serve", made.image, "--socket", tmp_path / "x.sock")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"nbd-overlay discard {made.image} removes it" in done.stderr
    check(PROGRAM, "discard", made.image)
    assert not made.image.exists()
    assert not Path(f"{made.image}.map").exists()


def test_what_the_guest_has_written_to_its_disk_since_is_not_taken_back(tmp_path: Path) -> None:
    made = cut(tmp_path)
    check(PROGRAM, "commit", made.image, made.disk)
    with made.disk.open("r+b") as file:
        file.seek(3 * MIB + 4096)
        file.write(b"newer")
    before = made.disk.read_bytes()
    assert "nothing was done" in check(PROGRAM, "commit", made.image, made.disk)
    assert made.disk.read_bytes() == before
    # Of a copy of the disk it is not said to be the guest's.
    shutil.copy(made.disk, tmp_path / "copy.img")
    said = check(PROGRAM, "commit", made.image, tmp_path / "copy.img")
    assert "if that was to this disk" in said


def test_a_disk_that_is_half_committed_is_made_whole_also_by_an_overlay_that_was_committed_elsewhere(
    tmp_path: Path,
) -> None:
    made = cut(tmp_path)
    rehearsal = made.copy_to(tmp_path / "rehearsal")
    check(PROGRAM, "commit", rehearsal.image, rehearsal.disk)
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync"]
    run(*strace, "-e", "inject=fdatasync:signal=KILL:when=1", PROGRAM, "commit", made.image, made.disk)
    assert mark_of(made.disk.read_bytes()[:4096]) is not None
    check(PROGRAM, "commit", rehearsal.image, made.disk)
    assert made.disk.read_bytes() == made.new


def test_a_disk_whose_guest_has_moved_from_this_host_is_refused_by_either_name(tmp_path: Path) -> None:
    made = cut(tmp_path)
    put_away(str(made.disk), "vm", "B:/vm.raw")
    for name in (made.disk, Path(f"{made.disk}.moved")):
        refused(made.image, name, wanted="nbd-migrate fence --lift")
    assert Path(f"{made.disk}.moved").read_bytes() == made.old


@pytest.mark.parametrize("kind", ["nbdserve", "nbdserve -f qcow2", "qemu-nbd", "no zeros", "device"])
def test_the_disk_may_be_an_export_in_any_format_or_a_device(kind: str, tmp_path: Path) -> None:
    made = cut(tmp_path)
    qcow2 = tmp_path / "disk.qcow2"
    with ExitStack() as stack:
        if kind == "device":
            # Larger than the disk.
            with made.disk.open("r+b") as file:
                file.truncate(SIZE + MIB)
            target = str(stack.enter_context(loop_device(made.disk)))
        elif kind == "nbdserve":
            server = stack.enter_context(nbdserve("-fraw", made.disk, directory=tmp_path))
            target = server.uri()
        elif kind == "nbdserve -f qcow2":
            check("qemu-img", "convert", "-O", "qcow2", made.disk, qcow2)
            target = stack.enter_context(nbdserve("-fqcow2", qcow2, directory=tmp_path)).uri()
        elif kind == "qemu-nbd":
            check("qemu-img", "convert", "-O", "qcow2", made.disk, qcow2)
            target = stack.enter_context(qemu_nbd("-fqcow2", qcow2, directory=tmp_path)).uri()
        else:
            server = stack.enter_context(nbdkit("--filter=nozero", "file", made.disk, directory=tmp_path))
            target = server.uri()
        check(PROGRAM, "commit", made.image, target)
    if qcow2.exists():
        check("qemu-img", "check", qcow2)
        check("qemu-img", "convert", "-O", "raw", qcow2, made.disk)
    assert made.disk.read_bytes()[:SIZE] == made.new


def test_killed_before_any_of_its_system_calls_it_leaves_a_disk_that_nobody_takes_for_one(
    tmp_path: Path,
) -> None:
    made = cut(tmp_path)
    seen = set()
    for call in ("pwrite64", "fallocate", "fdatasync"):
        for number in range(1, 100):
            here = made.copy_to(tmp_path / f"{call}{number}")
            kill = f"inject={call}:signal=KILL:when={number}"
            strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", kill]
            killed = run(*strace, PROGRAM, "commit", here.image, here.disk).returncode != 0
            content = here.disk.read_bytes()
            if mark_of(content[:4096]) is not None:
                seen.add("half")
                done = run(SERVER, "-r", "-fraw", "-k", here.image.with_suffix(".sock"), here.disk)
                assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
                assert "half committed" in done.stderr
                assert b"half committed" in content[:512]
            else:
                assert content in (made.old, made.new)
                seen.add("old" if content == made.old else "new")
            check(PROGRAM, "commit", here.image, here.disk)
            assert here.disk.read_bytes() == made.new, f"{call} {number}"
            shutil.rmtree(here.disk.parent)
            if not killed:
                break
        else:
            pytest.fail("it never came to its end")
    assert seen == {"old", "half", "new"}


def test_nothing_acknowledged_is_lost_where_the_overlay_was_killed_under_its_guest(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "disk.flat"
    content = bytearray(sparse_disk(disk, sparse_runs(SIZE, 256 * KIB)))
    with nbdserve("-r", "-fraw", disk, directory=tmp_path) as server:
        make_overlay(image, "flat", SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.read(0, MIB)
            write_like_a_guest(guest, content)
            daemon.process.signal(signal.SIGKILL)
            daemon.process.wait()
    check(PROGRAM, "commit", image, disk)
    assert disk.read_bytes() == content


def test_what_a_later_guest_may_have_read_is_committed_although_nobody_has_recorded_it(
    tmp_path: Path,
) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "disk.flat"
    content = bytearray(sparse_disk(disk, sparse_runs(SIZE, 256 * KIB)))
    for second in (False, True):
        with guest_of(disk, image, tmp_path) as (guest, daemon):
            found = guest.read(MIB, 64 * KIB)
            if second:
                assert found == content[MIB : MIB + 64 * KIB]
                guest.write(4 * MIB, found)
                content[4 * MIB : 4 * MIB + 64 * KIB] = found
            else:
                guest.flush()
                daemon.process.signal(signal.SIGKILL)
                daemon.process.wait()
        if not second:
            # Stored by the one that was killed, in the last instant, over what it had copied.
            with image.open("r+b") as file:
                file.seek(MIB)
                file.write(random_bytes(4096, 99))
            content[MIB : MIB + 4096] = random_bytes(4096, 99)
    check(PROGRAM, "commit", image, disk)
    assert disk.read_bytes() == content


def test_after_a_power_cut_what_was_flushed_is_committed_and_all_of_it_once_a_guest_has_run_since(
    tmp_path: Path,
) -> None:
    made = cut(tmp_path)
    beside = Path(f"{made.image}.map")
    storage = open_file(beside, writable=True)
    header = read_header(storage, str(beside))
    storage.write(0, replace(header, boot=uuid4(), flags=Flag(0)).pack())
    storage.close()
    again = made.copy_to(tmp_path / "again")
    check(PROGRAM, "commit", made.image, made.disk)
    assert made.disk.read_bytes() == made.new
    # What was copied, and a guest has written over without a flush: what it holds now a later guest may read.
    content = bytearray(made.new)
    with again.image.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(random_bytes(4096, 98))
    content[4 * MIB : 4 * MIB + 4096] = random_bytes(4096, 98)
    with guest_of(again.disk, again.image, again.disk.parent) as (guest, _):
        guest.read(4 * MIB, 4096)
    check(PROGRAM, "commit", again.image, again.disk)
    assert again.disk.read_bytes() == content


def test_of_several_disks_all_are_committed_or_none(tmp_path: Path) -> None:
    system, data = cut(tmp_path), cut(tmp_path, name="data", seed=50)
    refused(system.image, system.disk, data.image, tmp_path / "none", wanted="no such file")
    assert system.disk.read_bytes() == system.old
    pairs = [str(path) for each in (system, data) for path in (each.image, each.disk)]
    # When the second disk is complete, before the first is: that is what the guest boots from.
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync"]
    run(*strace, "-e", "inject=fdatasync:signal=KILL:when=7", PROGRAM, "commit", *pairs)
    assert data.disk.read_bytes() == data.new
    assert mark_of(system.disk.read_bytes()[:4096]) is not None
    told = json.loads(check(PROGRAM, "commit", "--json", *pairs))
    assert [each["was_committed"] for each in told] == [False, True]
    assert (system.disk.read_bytes(), data.disk.read_bytes()) == (system.new, data.new)


def test_an_overlay_that_was_copied_elsewhere_is_committed_there(tmp_path: Path) -> None:
    made = cut(tmp_path)
    there = made.copy_to(tmp_path / "there")
    check(PROGRAM, "commit", there.image, made.disk)
    assert made.disk.read_bytes() == made.new


def test_what_is_in_use_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    made = cut(tmp_path)
    with guest_of(made.disk, made.image, tmp_path):
        refused(made.image, made.disk, wanted="the image is in use")
    with nbdserve("-fraw", made.disk, directory=tmp_path):
        refused(made.image, made.disk, wanted="the image is in use")
    assert made.disk.read_bytes() == made.old


def test_a_disk_that_is_not_the_overlays_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    made, other = cut(tmp_path), tmp_path / "other.img"
    other.write_bytes(random_bytes(SIZE, 77))
    cases: dict[bytes, str] = {
        random_bytes(SIZE, 77): "not the disk that",
        # A clone of the same disk that has gone its own way in one place.
        made.old[: 4 * MIB] + b"\xff" * 4096 + made.old[4 * MIB + 4096 :]: "not the disk that",
        made.old + bytes(512): "another disk",
        made.old[:-100]: "truncate --size",
        mark(uuid4(), 4096) + made.old[4096:]: "from another overlay",
    }
    for content, wanted in cases.items():
        other.write_bytes(content)
        refused(made.image, other, wanted=wanted)
        assert other.read_bytes() == content
    qcow2 = tmp_path / "disk.qcow2"
    check("qemu-img", "convert", "-O", "qcow2", made.disk, qcow2)
    refused(made.image, qcow2, wanted="nbdserve -f qcow2")
    with nbdserve("-r", "-fraw", made.disk, directory=tmp_path) as server:
        refused(made.image, server.uri(), wanted="read-only")


def test_what_is_no_overlay_of_a_guest_is_refused(tmp_path: Path) -> None:
    made = cut(tmp_path)
    qed = make_overlay(tmp_path / "disk.qed", "qed", SIZE, "nbd://localhost/x")
    refused(qed, made.disk, wanted="qemu-img commit")
    refused(made.disk, made.disk.with_suffix(".copy"), wanted="it is a complete disk")
    refused(made.image, made.disk, made.image, wanted="without its TARGET", code=2)
    refused(made.image, made.disk, made.image, made.disk, wanted="named twice", code=2)
    refused(made.image, "", wanted="argument TARGET: it is empty", code=2)
    refused(made.image, made.disk, "", made.disk, wanted="it is empty", code=2)
    refused(made.image, "nbd://", wanted="nbd://", code=1)


def test_where_the_disk_has_no_room_it_says_what_to_do_and_goes_on_when_there_is(tmp_path: Path) -> None:
    made = cut(tmp_path)
    with nbdserve("-fraw", made.disk, directory=tmp_path) as server:
        failing = tmp_path / "failing.sock"

        words = ["--filter=error", "nbd", f"uri={server.uri()}"]
        options = ["error-pwrite-rate=50%", "error-pwrite=ENOSPC"]
        with nbdkit(*words, *options, directory=tmp_path, at=UnixAddress(failing)) as full:
            done = run(PROGRAM, "commit", made.image, full.uri())
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "type it again" in done.stderr
        check(PROGRAM, "commit", made.image, server.uri())
    assert made.disk.read_bytes() == made.new
