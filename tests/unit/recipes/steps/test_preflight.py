"""What is refused of several disks together, before anything starts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from nbdserve.common.errors import UsageError
from overlay.formats.flat.header import Header
from recipes.checks.chains import held
from recipes.checks.disk_nodes import DiskNode
from recipes.checks.other_media import check_same
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.channel import Channel
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Finish, Plan, Source
from recipes.qemu.vm import CommandError
from recipes.steps.preflight import (
    check_apart,
    check_moves,
    check_private,
    check_served,
    check_space,
    in_the_way,
)
from tests.support.loops import loop_device
from tests.unit.recipes.checks.hosts import ToldVm

GIB = 1 << 30


def plan_of(*images: str) -> Plan:
    """A plan for these images."""
    return Plan(
        Source(qmp="/a.qmp"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m"),
        disk=tuple(PlannedDisk(image, f"/b/{n}.raw", f"disk{n}") for n, image in enumerate(images)),
    )


class Answering:
    """A host whose stat says this."""

    name = "B"

    def __init__(self, *lines: str) -> None:
        self._lines = lines

    async def run(self, *command: str, limit: float) -> str:
        return "".join(f"{line}\n" for line in self._lines)


def check(held: tuple[str, ...], free: tuple[str, ...]) -> None:
    """Compare what is held on A, in blocks, with what is free on B: file system, blocks, size of a block."""
    plan = plan_of(*(f"/{number}.raw" for number in range(len(held))))
    # Of each disk a map, its logs, and its content.
    told = [each for each in free for _ in ("map", "logs")] + list(free)
    a, b = (cast(Host, Answering(*lines)) for lines in (held, told))
    asyncio.run(check_space(plan, [GIB] * len(held), a, b))


def test_disks_that_fit_each_by_itself_may_be_too_much_for_one_file_system() -> None:
    half = f"{GIB // 512 * 6 // 10} 512"
    with pytest.raises(
        MigrationError, match=r"disk.target: on B /b needs 1.2.* GiB at least, and 1 GiB are left; make room"
    ):
        check((half, half), ("fs1 262144 4096", "fs1 262144 4096"))
    check((half, half), ("fs1 262144 4096", "fs2 262144 4096"))
    with pytest.raises(MigrationError, match=r"on B /b needs .* are left; /b needs .* are left; make room"):
        check((half, half), ("fs1 1 4096", "fs2 1 4096"))


def test_maps_and_logs_need_space_too() -> None:
    nothing, free = "0 512", Header(GIB, uuid4(), uuid4()).map_bytes + (1 << 20)
    check((nothing,), (f"fs1 {free} 1",))
    with pytest.raises(MigrationError, match=r"on B /b needs 3.* MiB at least, and 3.* MiB are left"):
        check((nothing,), (f"fs1 {free - 1} 1",))


def test_a_disk_that_goes_to_a_device_needs_space_only_for_its_map_and_logs(tmp_path: Path) -> None:
    disk = PlannedDisk("/0.raw", "/dev/vg/lv", "disk0", state=str(tmp_path / "is" / "to" / "be" / "made"))
    plan, a = replace(plan_of("/0.raw"), disk=(disk,)), cast(Host, Answering(f"{GIB // 512} 512"))
    few = f"fs1 {4 << 20} 1"
    asyncio.run(check_space(plan, [GIB], a, cast(Host, Answering(few, few))))
    asyncio.run(check_space(plan, [GIB], a, Host("B")))
    with pytest.raises(
        MigrationError, match=f"on B {disk.directory} needs 3.* MiB at least, and 0 B are left"
    ):
        asyncio.run(check_space(plan, [GIB], a, cast(Host, Answering("fs1 0 1", "fs1 0 1"))))


def test_a_sparse_image_needs_no_more_than_it_holds() -> None:
    check((f"{GIB // 512} 512", "0 512"), ("fs1 264192 4096", "fs1 264192 4096"))


def test_two_names_of_one_image_are_found_behind_links(tmp_path: Path) -> None:
    first, second = tmp_path / "first.raw", tmp_path / "second.raw"
    first.write_bytes(bytes(1 << 20))
    second.hardlink_to(first)
    plan = plan_of(str(first), str(second))
    with pytest.raises(MigrationError, match=rf"disk.image: {first} and {second} are the same on A"):
        asyncio.run(check_apart(plan, Host("A"), [str(first), str(second)], "image"))
    # Nor does it matter that there is nothing yet.
    (tmp_path / "here").symlink_to(tmp_path)
    paths = [str(tmp_path / "new.raw"), str(tmp_path / "here" / "new.raw")]
    with pytest.raises(MigrationError, match=r"disk.target: .* are the same on B"):
        asyncio.run(check_apart(plan, Host("B"), paths, "target"))
    asyncio.run(check_apart(plan, Host("B"), [str(first), str(tmp_path / "new.raw")], "target"))


def test_two_nodes_of_one_device_are_one_disk(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    link = tmp_path / "lv"
    with loop_device(image) as device:
        link.symlink_to(device)
        plan = plan_of(str(device), str(link))
        with pytest.raises(MigrationError, match="are the same on A"):
            asyncio.run(check_apart(plan, Host("A"), [str(device), str(link)], "image"))


class Serving(ToldVm):
    """A QEMU that has an NBD server already, or cannot listen where nobody can."""

    def __init__(self, kind: str, refusal: str) -> None:
        disk = {"device": "", "qdev": "disk", "inserted": {"node-name": "#block1"}}
        super().__init__({"query-block": [disk, {"device": "cd", "qdev": "cd"}], "qom-get": kind})
        self._refusal = refusal

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        if command == "nbd-server-start":
            raise CommandError(f"refused: {self._refusal}", self._refusal)
        return await super().call(command, given, limit=limit)


def served(policy: str, kind: str = "virtio-blk-pci", refusal: str = "Not a directory") -> None:
    """See whether A's QEMU can serve what this policy needs, of a raw disk."""
    plan = plan_of("/a.raw")
    plan = replace(plan, destination=replace(plan.destination, policy=policy))
    nodes = [DiskNode("#block1", GIB, {})]
    asyncio.run(check_served(plan, nodes, Serving(kind, refusal), Host("A")))


def test_who_has_an_nbd_server_is_told_before_anything_starts_where_bitmaps_are_read() -> None:
    served("hybrid")
    served("postcopy", refusal="NBD server already running")
    with pytest.raises(MigrationError, match="A's QEMU has an NBD server already"):
        served("hybrid", refusal="NBD server already running")


@pytest.mark.parametrize("kind", ["scsi-block", "scsi-generic"])
def test_a_disk_whose_writes_no_bitmap_would_have_is_not_copied_before(kind: str) -> None:
    served("postcopy", kind)
    served("hybrid", "scsi-hd")
    with pytest.raises(UsageError, match=f"the disk of disk is in a {kind}, and what its guest writes goes"):
        served("hybrid", kind)


@pytest.mark.parametrize("tool", ["qemu-img", "sha256sum"])
def test_what_a_slow_disk_is_asked_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    """The tables of a large qcow2 image, or what is in a CD, take longer to read than a command has."""
    (tmp_path / tool).write_text(f"#!/bin/sh\nsleep 2; echo '{{\"required\": {GIB}}}'\n")
    (tmp_path / tool).chmod(0o755)
    (tmp_path / "x.iso").write_bytes(b"x")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    plan = replace(plan_of("/a.qcow2"), limits=Limits(command=1.0, start=1.0))
    plan = replace(plan, destination=replace(plan.destination, same=(str(tmp_path / "x.iso"),)))
    host = Host("A")
    if tool == "qemu-img":
        assert asyncio.run(held(plan, plan.disks[0], host)) == GIB
    else:
        asyncio.run(check_same(plan, host, host))


@pytest.mark.parametrize("name", ["a.raw.tls", "b.raw.tls"])
def test_a_directory_of_somebody_elses_where_keys_will_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "ca-cert.pem").touch()
    plan = Plan(
        Source(qmp="/a.qmp", image=str(tmp_path / "a.raw")),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m", image=str(tmp_path / "b.raw")),
    )
    with pytest.raises(MigrationError, match=rf"{name} exists on [AB], where .*: rm -r -- .*/{name}$"):
        asyncio.run(check_private(plan, Host("A"), Host("B")))
    asyncio.run(check_private(replace(plan, channel=Channel("plain")), Host("A"), Host("B")))


def test_every_thing_that_is_in_the_way_is_found_at_once_and_a_dead_socket_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as listening:
        dead.bind(str(tmp_path / "dead"))
        dead.close()
        listening.bind(str(tmp_path / "listening"))
        listening.listen()
        paths = [str(tmp_path / name) for name in ("file", "nothing", "dead", "link", "listening")]
        found = asyncio.run(in_the_way(Host("B"), paths, 60.0))
    assert [Path(path).name for path in found] == ["file", "link", "listening"]
    assert asyncio.run(in_the_way(Host("B"), [], 60.0)) == []


def test_where_images_are_moved_to_is_looked_at_for_all_of_them(tmp_path: Path) -> None:
    images = [tmp_path / "a0.raw", tmp_path / "a1.raw"]
    for image in images:
        image.touch()
    aside = tmp_path / "aside"
    plan = replace(plan_of(*map(str, images)), finish=Finish(move_aside=str(aside)))
    with pytest.raises(MigrationError, match=rf"^finish\.move_aside: there is no directory {aside} on A"):
        asyncio.run(check_moves(plan, Host("A")))
    aside.mkdir()
    asyncio.run(check_moves(plan, Host("A")))
    (aside / "a1.raw").touch()
    with pytest.raises(MigrationError, match=rf"^finish\.move_aside: {aside}/a1\.raw exists on A"):
        asyncio.run(check_moves(plan, Host("A")))


def test_what_is_not_installed_is_asked_for_at_once() -> None:
    behind_a_shell = Host("B", ("sh", "-c", '"$@"', "sh"))
    for host in (Host("A"), behind_a_shell):
        assert asyncio.run(host.lacking(["sh", "no-such-command", "cat", "nor this"], 60.0)) == [
            "no-such-command",
            "nor this",
        ]
