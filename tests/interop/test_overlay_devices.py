"""Overlays on block devices: the data is there, the map is not, and a device cannot grow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any
from uuid import uuid4

import pytest

from overlay.formats.flat.header import Flag, Trailer
from tests.support.disks import KIB, MIB, random_disk
from tests.support.loops import loop_device
from tests.support.overlays import NBD_OVERLAY, overlay
from tests.support.processes import Argument, check, run
from tests.support.servers import Server, nbdserve

SIZE = 8 * MIB
ROOM = (0, 512, 4 * KIB, 3 * MIB)
"""By how many bytes a device is larger than the disk: the trailer over it, half over it, behind it."""


@dataclass(frozen=True)
class Place:
    """A device, the file beneath it, where its map is, and what was on it before."""

    device: Path
    file: Path
    map: Path
    before: bytes
    disk: bytes
    server: Server

    def create(self, *arguments: Argument) -> str:
        """Make an overlay on it."""
        uri = self.server.uri()
        return check(NBD_OVERLAY, "create", "--backing", uri, "--map", self.map, *arguments, self.device)

    def info(self) -> dict[str, Any]:
        """What is said of it, by the device alone."""
        told: dict[str, Any] = json.loads(check(NBD_OVERLAY, "info", "--json", self.device))
        return told

    def fill(
        self, directory: Path, *arguments: Argument, writes: Callable[[Any], None] | None = None
    ) -> None:
        """Serve it until it is complete."""
        with overlay(self.device, "--stream", *arguments, directory=directory) as daemon:
            if writes is not None:
                with daemon.guest() as guest:
                    writes(guest)
            daemon.wait_for_status(complete=True)

    def content(self) -> bytes:
        """All that is on the device."""
        return self.device.read_bytes()


@contextmanager
def place(directory: Path, room: int, *, is_empty: bool = False) -> Iterator[Place]:
    """A device that is so many bytes larger than the disk that a server has."""
    disk = random_disk(directory / "disk", SIZE)
    file = directory / "file"
    before = bytes(SIZE + room) if is_empty else random_disk(file, SIZE + room)
    file.write_bytes(before)
    with (
        nbdserve("--read-only", directory / "disk", directory=directory) as server,
        loop_device(file) as device,
    ):
        yield Place(device, file, directory / "state" / "x.map", before, disk, server)


@pytest.fixture
def exact(tmp_path: Path) -> Iterator[Place]:
    """A device that is exactly as large as the disk."""
    with place(tmp_path, 0) as made:
        yield made


def refusal(*argv: Argument) -> str:
    """The one line with which a command fails."""
    done = run(NBD_OVERLAY, *argv)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize("room", ROOM)
def test_the_device_is_the_disk_in_the_end_and_what_lay_behind_it_is_as_before(
    room: int, tmp_path: Path
) -> None:
    new = os.urandom(1000)
    with place(tmp_path, room) as made:
        made.create("--force")
        told = made.info()
        assert (told["virtual-size"], told["local-size"], told["device-size"]) == (SIZE, 0, SIZE + room)
        assert told["map-filename"] == str(made.map)

        def write(guest: Any) -> None:
            guest.write(SIZE - 1000, new)
            assert guest.read(SIZE - 5 * KIB, 5 * KIB) == made.disk[-5 * KIB : -1000] + new
            guest.zero(64 * KIB, 70 * KIB)
            assert guest.client.size == SIZE

        made.fill(tmp_path, writes=write)
        wanted = bytearray(made.disk[:-1000] + new + made.before[SIZE:])
        wanted[64 * KIB : 134 * KIB] = bytes(70 * KIB)
        assert made.content() == wanted
        assert list(made.map.parent.iterdir()) == []
        assert list(made.device.parent.glob(f"{made.device.name}.*")) == []
        assert made.info()["virtual-size"] == SIZE + room
        # Whoever serves it before QEMU has pivoted says how large the disk is.
        with overlay(made.device, "--size", str(SIZE), directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.client.size == SIZE
            assert guest.read(0, SIZE) == wanted[:SIZE]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("room", ROOM)
def test_an_empty_overlay_is_discarded_and_the_device_is_as_it_was(room: int, tmp_path: Path) -> None:
    with place(tmp_path, room) as made:
        made.create("--force")
        assert made.content() != made.before
        check(NBD_OVERLAY, "discard", made.device)
        assert made.content() == made.before
        assert not made.map.exists()
        check(NBD_OVERLAY, "discard", made.device)  # where there is none nothing happens
        assert made.content() == made.before


@pytest.mark.parametrize("is_trailer_there", [True, False])
def test_what_a_killed_create_has_left_is_discarded(exact: Place, is_trailer_there: bool) -> None:
    exact.create("--force")
    with exact.map.open("r+b") as file:
        file.write(bytes(512))
    if not is_trailer_there:
        with exact.device.open("r+b") as device:
            device.seek(SIZE - 4 * KIB)
            device.write(exact.before[-4 * KIB :])
    assert "does not begin with" in refusal("info", "--map", exact.map, exact.device)
    check(NBD_OVERLAY, "discard", "--map", exact.map, exact.device)
    assert exact.content() == exact.before
    assert not exact.map.exists()


@pytest.mark.parametrize("what", ["a disk whose beginning is zeros", "an empty file"])
def test_no_file_is_removed_that_a_guest_has_named_in_a_trailer_of_its_own(
    exact: Place, tmp_path: Path, what: str
) -> None:
    """The last bytes of a device that is exactly as large as the disk are the guest's once it is complete."""
    other = tmp_path / "other.img"
    other.write_bytes(b"" if what == "an empty file" else bytes(64 * KIB) + os.urandom(8 * MIB))
    content = other.read_bytes()
    forged = Trailer(SIZE, uuid4(), Flag.ON_DEVICE, str(other))
    with exact.device.open("r+b") as device:
        device.seek(SIZE - 4 * KIB)
        device.write(forged.pack())
    before = exact.content()
    for arguments in ([], ["--copies"]):
        told = refusal("discard", *arguments, exact.device)
        assert str(other) in told, told
        assert "not the map of a flat image" in told, told
    assert other.read_bytes() == content
    assert exact.content() == before


def test_what_a_guest_has_named_in_a_trailer_of_its_own_is_not_opened_unless_it_is_a_file(
    exact: Place, tmp_path: Path
) -> None:
    """To open a watchdog, or a tape, does something already."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with exact.device.open("r+b") as device:
        device.seek(SIZE - 4 * KIB)
        device.write(Trailer(SIZE, uuid4(), Flag.ON_DEVICE, str(pipe)).pack())
    # It waits until somebody opens the pipe to read.
    with Popen(["sh", "-c", ': >"$1"', "sh", pipe]) as waiting:
        try:
            for command in (["info"], ["check"], ["map"], ["serve", "-k", tmp_path / "s"], ["discard"]):
                assert f"{pipe}: not a regular file" in refusal(*command, exact.device)
            assert waiting.poll() is None
        finally:
            waiting.kill()


def test_no_file_is_removed_that_is_named_as_a_map_and_is_none(exact: Place, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    assert "not the map of a flat image" in refusal("discard", "--map", other, exact.device)
    assert other.exists()
    assert exact.content() == exact.before


def test_what_holds_something_is_not_discarded(exact: Place, tmp_path: Path) -> None:
    exact.create("--force")
    with overlay(exact.device, directory=tmp_path) as daemon, daemon.guest() as guest:
        guest.write(SIZE - 512, b"x" * 512)
    assert "it is no empty overlay" in refusal("discard", exact.device)
    assert "it is no overlay without a guest's writes" in refusal("discard", "--copies", exact.device)
    with overlay(exact.device, directory=tmp_path) as daemon, daemon.guest() as guest:
        assert guest.read(SIZE - 1024, 1024) == exact.disk[-1024:-512] + b"x" * 512


def test_a_device_without_its_map_is_no_whole_disk(exact: Place, tmp_path: Path) -> None:
    exact.create("--force")
    away = tmp_path / "away.map"
    exact.map.rename(away)
    for command in (["info"], ["check"], ["map"], ["serve", "-k", tmp_path / "s"], ["discard"]):
        told = refusal(*command, exact.device)
        assert "map" in told
        assert "is missing" in told
        assert str(exact.map) in told
    check(NBD_OVERLAY, "info", "--map", away, exact.device)
    # Whoever writes to it with the map in its new place lets the trailer name that.
    with overlay(exact.device, "--map", away, directory=tmp_path):
        pass
    assert exact.info()["map-filename"] == str(away)
    exact.fill(tmp_path)
    assert exact.content() == exact.disk
    assert not away.exists()


def test_a_map_of_another_device_is_refused(exact: Place, tmp_path: Path) -> None:
    exact.create("--force")
    other = tmp_path / "other.map"
    other.write_bytes(exact.map.read_bytes())
    check(NBD_OVERLAY, "discard", exact.device)
    exact.create("--force")
    assert "belongs to another device" in refusal("info", "--map", other, exact.device)
    check(NBD_OVERLAY, "discard", exact.device)
    assert "has lost its trailer" in refusal("info", "--map", other, exact.device)
    assert exact.content() == exact.before


def test_a_device_that_has_changed_its_size_is_refused(exact: Place) -> None:
    exact.create("--force")
    with exact.file.open("r+b") as file:
        file.truncate(SIZE + MIB)
    check("losetup", "--set-capacity", exact.device)
    told = refusal("info", "--map", exact.map, exact.device)
    assert f"the device has {SIZE + MIB} bytes, and {SIZE} when its map" in told


def test_a_copy_of_an_incomplete_device_is_no_disk(exact: Place, tmp_path: Path) -> None:
    exact.create("--force")
    copy = tmp_path / "copy"
    copy.write_bytes(exact.content())
    for command in ("info", "check", "map"):
        assert "a copy of a block device on which an overlay is not complete" in refusal(command, copy)
    assert "a copy of a block device" in refusal("serve", "-k", tmp_path / "s", copy)
    file = tmp_path / "file.img"
    check(NBD_OVERLAY, "create", "--backing", exact.server.uri(), "--size", str(SIZE - 4 * KIB), file)
    check(NBD_OVERLAY, "discard", exact.device)
    exact.device.write_bytes(file.read_bytes())
    assert "a copy of an overlay's data file" in refusal("info", exact.device)


def test_what_is_on_a_device_is_overwritten_only_with_force(exact: Place) -> None:
    create = ("create", "--backing", exact.server.uri(), "--map", exact.map, exact.device)
    assert "there is something on it; --force overwrites it" in refusal(*create)
    assert exact.content() == exact.before
    assert not exact.map.exists()
    exact.device.write_bytes(bytes(SIZE))
    exact.create()
    again = refusal(*create)
    assert "the map of another image exists" in again
    other = exact.map.with_name("y.map")
    again = refusal("create", "--backing", exact.server.uri(), "--map", other, exact.device)
    assert "there is an overlay that is not complete on it" in again
    assert not other.exists()


def test_a_device_that_is_in_use_is_refused(exact: Place, tmp_path: Path) -> None:
    exact.create("--force")
    held = os.open(exact.device, os.O_RDONLY | os.O_EXCL)
    try:
        assert "the device is in use: mounted, or held by" in refusal(
            "serve", "-k", tmp_path / "s", exact.device
        )
        assert "the device is in use" in refusal("discard", exact.device)
    finally:
        os.close(held)
    with overlay(exact.device, directory=tmp_path):
        assert "in use" in refusal("info", exact.device)
        check(NBD_OVERLAY, "info", "-U", exact.device)
        assert "in use" in refusal(
            "create", "--force", "--backing", "nbd://h/x", "--size", "1M", exact.device
        )
        qemu = run("qemu-io", "-c", "write 0 512", "-f", "raw", exact.device)
        assert qemu.returncode
        assert 'Failed to get "write" lock' in qemu.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--layout", "qed"], "cannot hold a QED image"),
        (["--owner", "root"], "leave out --owner and --mode"),
        (["--cluster-size", "64K"], "--cluster-size is for --layout qed"),
        (["--size", "9M"], "too few for a disk of 9437184"),
        (["--map", "/dev/x.map"], "among the devices"),
        (["--map", f"/{'y' * 240}/{'z' * 240}"], "has at most 463 bytes"),
    ],
)
def test_what_a_device_cannot_be_is_refused_in_one_line(
    exact: Place, arguments: list[str], line: str
) -> None:
    told = refusal("create", "--force", "--backing", exact.server.uri(), *arguments, exact.device)
    assert line in told
    assert exact.content() == exact.before


def test_force_overwrites_no_file_that_is_no_map(exact: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("what nobody wants to lose\n")
    create = ["create", "--force", "--backing", exact.server.uri()]
    told = refusal(*create, "--map", other, exact.device)
    assert f"{other}: the image's map comes there, and this file is no map" in told, told
    assert exact.content() == exact.before
    (tmp_path / "vm").write_bytes(b"old")
    other.rename(tmp_path / "vm.map")
    assert "this file is no map" in refusal(*create, tmp_path / "vm")
    assert (tmp_path / "vm").read_bytes() == b"old"
    assert (tmp_path / "vm.map").read_text() == "what nobody wants to lose\n"


@pytest.mark.parametrize("command", ["create", "check", "discard"])
def test_a_device_that_takes_no_writes_is_refused_before_anything_is_made(
    command: str, exact: Place, tmp_path: Path
) -> None:
    beside = tmp_path / "none.map"
    words: dict[str, list[Argument]] = {
        "create": ["create", "--force", "--backing", exact.server.uri(), "--map", beside],
        "check": ["check", "--repair"],
        "discard": ["discard"],
    }
    with loop_device(tmp_path / "disk", "--read-only") as device:
        told = refusal(*words[command], device)
        assert f"{device}: the device is read-only; make it writable, or take another" in told, told
    assert not beside.exists()


@pytest.mark.parametrize("is_device", [True, False])
def test_a_forced_image_that_cannot_be_made_leaves_no_new_file(
    is_device: bool, exact: Place, tmp_path: Path
) -> None:
    image, beside = tmp_path / "vm", tmp_path / "vm.map"
    made_at = [exact.device, "--map", beside] if is_device else [image]
    create = [NBD_OVERLAY, "create", "--force", "--size", "64K", "--backing", exact.server.uri(), *made_at]
    done = run("prlimit", f"--fsize={1 * MIB}", *create)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "File too large" in done.stderr, done.stderr
    assert not image.exists()
    assert not beside.exists()
    assert exact.content() == exact.before


def test_a_path_among_the_devices_that_is_none_makes_no_file_there() -> None:
    for command in (
        ["create", "--size", "1M", "--backing", "nbd://h/x", "/dev/no-such"],
        ["create", "--force", "--size", "1M", "--backing", "nbd://h/x", "/dev/no-such"],
    ):
        assert "there is no such block device" in refusal(*command)
    assert not Path("/dev/no-such").exists()


def test_options_for_devices_are_refused_with_files(tmp_path: Path) -> None:
    image = tmp_path / "x"
    create = ["create", "--size", "1M", "--backing", "nbd://h/x"]
    assert "leave it out" in refusal(*create, "--map", tmp_path / "m", image)
    check(NBD_OVERLAY, *create, image)
    assert "on a block device" in refusal("info", "--map", tmp_path / "m", image)
    assert "on a block device" in refusal("serve", "-k", tmp_path / "s", "--size", "1M", image)
    assert "leave it out" in refusal("discard", "--map", tmp_path / "m", image)


def test_without_an_option_the_map_is_in_the_state_directory(exact: Place, tmp_path: Path) -> None:
    link = tmp_path / "vg" / "lv"
    link.parent.mkdir()
    link.symlink_to(exact.device)
    name = "-".join(part.replace("-", "--") for part in link.parts[1:])
    wanted = Path("/var/lib/nbd-overlay") / f"{name}.map"
    try:
        check(NBD_OVERLAY, "create", "--force", "--backing", exact.server.uri(), link)
        assert exact.info()["map-filename"] == str(wanted)
        check(NBD_OVERLAY, "check", exact.device)
    finally:
        check(NBD_OVERLAY, "discard", link)
    assert not wanted.exists()
    assert exact.content() == exact.before
