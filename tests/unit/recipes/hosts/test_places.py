"""Where logs and process ids are kept."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from overlay.formats.device.map_place import name_of
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import Places, beside, left_beside, making, place_of, removing
from recipes.qemu import exporter
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


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_what_is_left_beside_an_image_is_found_whatever_it_is(tmp_path: Path, shell: str) -> None:
    image = tmp_path / "it's a disk.raw"
    (tmp_path / f"{image.name}.tls").mkdir()
    (tmp_path / f"{image.name}.exporter").symlink_to("nowhere")
    host = Host("A", (shell, "-c", '"$@"', shell))
    found = asyncio.run(left_beside(host, str(image), [".tls", ".exporter", ".other"], 60.0))
    assert found == [f"{image}.tls", f"{image}.exporter"]
    assert asyncio.run(left_beside(host, str(tmp_path / "another"), [".tls"], 60.0)) == []
    assert asyncio.run(beside(host, str(image), ".tls", 60.0)) == f"{image}.tls"


def test_a_private_directory_takes_the_place_of_one_that_was_left_and_of_no_other(tmp_path: Path) -> None:
    host, where = Host("A"), tmp_path / "above" / "a.raw.tls"

    def make() -> None:
        asyncio.run(host.run("sh", "-c", making(["key"]), "sh", str(where), limit=60.0))

    make()
    (where / "key").touch()
    make()
    assert list(where.iterdir()) == []
    assert (where.stat().st_mode & 0o777, where.parent.stat().st_mode & 0o777) == (0o700, 0o755)
    (where / "somebody's").touch()
    for script in (making(["key"]), removing(["key"])):
        with pytest.raises(MigrationError, match="not empty"):
            asyncio.run(host.run("sh", "-c", script, "sh", str(where), limit=60.0))
    assert (where / "somebody's").exists()
    (where / "somebody's").unlink()
    asyncio.run(host.run("sh", "-c", removing(["key"]), "sh", str(where), limit=60.0))
    assert not where.exists()


EXCHANGING = """#!/bin/sh
{real} "$@" || exit
for last; do :; done
case $last in *.exporter) mv -- "$last" "$last.ours"; ln -s {victim} "$last";; esac
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("empty", [True, False])
def test_who_may_write_beside_an_image_has_nothing_else_given_to_him(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool
) -> None:
    """Between mkdir and what comes after it a link takes the directory's place, as its owner may have it."""
    victim, where = tmp_path / "victim", tmp_path / "images" / "a.raw.exporter"
    victim.mkdir(mode=0o700)
    if not empty:
        (victim / "nbd").write_text("ours")
    mkdir = tmp_path / "bin" / "mkdir"
    mkdir.parent.mkdir()
    mkdir.write_text(EXCHANGING.format(real=shutil.which("mkdir"), victim=victim))
    mkdir.chmod(0o755)
    monkeypatch.setenv("PATH", f"{mkdir.parent}", prepend=":")
    with pytest.raises(MigrationError, match="was exchanged by somebody while it was made"):
        asyncio.run(exporter.place(Host("A"), str(where), "nobody", 60.0))
    assert (victim.stat().st_uid, victim.stat().st_mode & 0o777) == (0, 0o700)
    assert [each.name for each in victim.iterdir()] == ([] if empty else ["nbd"])
