"""Where logs and process ids are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

from overlay.formats.device.map_place import name_of
from recipes.hosts.host import Host
from recipes.hosts.places import Places, place_of
from tests.support.loops import loop_device


def test_every_device_has_a_place_of_its_own() -> None:
    assert name_of("/dev/loop0") == "dev-loop0"
    assert name_of("/dev/vg/lv") == name_of("/dev//vg/./lv") == "dev-vg-lv"
    devices = ("/dev/vg/a-b", "/dev/vg-a/b", "/dev/vg/a/b", "/dev/mapper/vg-a-b", "/dev/mapper/vg--a-b")
    assert len({name_of(device) for device in devices}) == len(devices)


def place(host: Host, image: Path) -> str:
    """Where that host keeps what belongs to this image."""
    return str(asyncio.run(place_of(host, str(image), 30.0)))


def test_what_belongs_to_a_file_is_beside_it_and_to_a_device_in_the_systems_place(tmp_path: Path) -> None:
    file, link = tmp_path / "a b'.raw", tmp_path / "link"
    file.write_bytes(bytes(1 << 20))
    assert place(Host("A"), file) == str(tmp_path)
    with loop_device(file) as device:
        link.symlink_to(device)
        assert place(Host("A"), device) == f"/var/lib/nbd-migrate/{name_of(str(device))}"
        assert place(Host("A"), link) == f"/var/lib/nbd-migrate/{name_of(str(link))}"
        nobody = ("setpriv", "--reuid=65534", "--clear-groups", "env", "-u", "XDG_STATE_HOME", "HOME=/home/n")
        assert place(Host("A", nobody), device).startswith("/home/n/.local/state/nbd-migrate/dev-loop")
        assert place(Host("A", (*nobody, "XDG_STATE_HOME=/s")), device).startswith("/s/nbd-migrate/dev-loop")


def test_in_one_directory_for_all_no_two_disks_have_the_same_log() -> None:
    images = ("/system/disk.raw", "/data/disk.raw", "/data/other.raw"), ("/b/disk.raw",)
    places = Places("/var/log/vm", images, 30.0)
    found = [asyncio.run(places.place(Host("A"), image, "fence")) for side in images for image in side]
    assert [path.name for path in found] == [
        *("system-disk.raw.fence", "data-disk.raw.fence", "other.raw.fence", "disk.raw.fence"),
    ]
    assert {str(path.parent) for path in found} == {"/var/log/vm"}
