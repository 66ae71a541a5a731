"""What a QEMU has open of a disk, and what its files say: real QEMUs and images, without a guest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserve.common import clock
from nbdserve.common.errors import OperatorError
from recipes.checks.chains import check_chains, held, left_on_a
from recipes.checks.disk_nodes import DiskNode, disk_nodes
from recipes.hosts.host import Host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.vm import connect
from tests.support.disks import MIB, random_bytes
from tests.support.monitors import monitor as answering
from tests.support.processes import Process, check, listens

HERE = Host("this host")
SECONDS = 120.0


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with an image over another over a raw one, whose names are relative, and others."""
    (tmp_path / "base.raw").write_bytes(random_bytes(4 * MIB))
    (tmp_path / "other.raw").write_bytes(random_bytes(4 * MIB, seed=2))
    made = ("qemu-img", "create", "-q", "-f", "qcow2")
    check(*made, "-F", "raw", "-b", "base.raw", "middle.qcow2", cwd=tmp_path)
    check(*made, "-F", "qcow2", "-b", "middle.qcow2", "top.qcow2", cwd=tmp_path)
    check(*made, "plain.qcow2", "4M", cwd=tmp_path)
    check(*made, "-o", f"data_file={tmp_path / 'data.raw'}", "elsewhere.qcow2", "4M", cwd=tmp_path)
    return tmp_path


def block(driver: str, file: Path, **more: object) -> dict[str, object]:
    """The options of an image."""
    return {"driver": driver, "file": {"driver": "file", "filename": str(file)}, **more}


@contextmanager
def opened(directory: Path, *options: str | dict[str, object]) -> Iterator[Path]:
    """A QEMU that has these images open; its monitor."""
    monitor = directory / "a.qmp"
    words = [
        word
        for each in options
        for word in (("-drive", each) if isinstance(each, str) else ("-blockdev", json.dumps(each)))
    ]
    argv = [
        *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
        *(*words, "-qmp", f"unix:{monitor},server=on,wait=off"),
    ]
    with Process(argv, directory / "a.log") as qemu:
        qemu.wait_for(lambda: listens(monitor), "its monitor", SECONDS)
        with answering(monitor) as a:
            # Only then it has opened them.
            a.execute("query-status")
        yield monitor


def plan_of(monitor: Path, image: Path, **more: Any) -> Plan:
    """A plan for one disk."""
    return Plan(
        Source(qmp=str(monitor)),
        Export("nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/run/b.qmp", migration="unix:/run/m"),
        disk=(PlannedDisk(str(image), "/b.raw", "disk0", **more),),
    )


def looked_at(monitor: Path, image: Path, **more: str) -> DiskNode:
    """What is found of a disk; raises where it cannot move."""
    plan = plan_of(monitor, image, **more)

    async def body() -> DiskNode:
        a = await connect("A's QEMU", str(monitor), limit=SECONDS, command_limit=SECONDS)
        try:
            nodes = await disk_nodes(plan, a)
            await check_chains(plan, nodes, HERE)
            return nodes[0]
        finally:
            await a.disconnect()

    return clock.run(body())


def refused(monitor: Path, image: Path, **more: str) -> str:
    """The one line that says why it cannot."""
    with pytest.raises(OperatorError) as caught:
        looked_at(monitor, image, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.representative
def test_a_chain_is_found_however_it_was_opened(images: Path) -> None:
    top = images / "top.qcow2"
    with opened(images, f"file={top},if=none,id=d,format=qcow2") as monitor:
        assert looked_at(monitor, top, format="qcow2").size == 4 * MIB
    below = block("qcow2", images / "middle.qcow2", backing=block("raw", images / "base.raw"))
    # With absolute names of what the files know by relative ones QEMU tells "json:" names.
    with opened(images, block("qcow2", top, backing=below, **{"node-name": "n"})) as monitor:
        node = looked_at(monitor, top, format="qcow2")
        assert (node.name, node.size) == ("n", 4 * MIB)


@pytest.mark.representative
def test_an_image_that_was_opened_over_others_than_its_file_says_is_refused(images: Path) -> None:
    top, middle, base = (images / name for name in ("top.qcow2", "middle.qcow2", "base.raw"))
    chain = f"{top} (qcow2) over {middle} (qcow2) over {base} (raw)"
    said = f"and the files themselves say {chain}: after the cut-over"
    for below, told in (
        (None, f"A's QEMU has {top} (qcow2), {said}"),
        (block("raw", base), f"A's QEMU has {top} (qcow2) over {base} (raw), {said}"),
        (
            block("qcow2", middle, backing=block("raw", images / "other.raw")),
            f"A's QEMU has {top} (qcow2) over {middle} (qcow2) over {images / 'other.raw'} (raw), {said}",
        ),
    ):
        options = block("qcow2", top, backing=below, **{"node-name": "n"})
        with opened(images, options) as monitor:
            assert told in refused(monitor, top, format="qcow2", node="n")


def test_what_only_qemu_can_read_is_refused_by_its_name(images: Path) -> None:
    elsewhere, plain, base = (images / name for name in ("elsewhere.qcow2", "plain.qcow2", "base.raw"))
    with opened(
        images,
        block("qcow2", elsewhere, **{"node-name": "elsewhere"}),
        block("qcow2", plain, **{"node-name": "plain"}),
        block("raw", base, **{"node-name": "base", "read-only": True}),
    ) as monitor:
        assert f"{elsewhere} has its data in another file ({images / 'data.raw'})" in refused(
            monitor, elsewhere, format="qcow2"
        )
        assert refused(monitor, plain) == (
            f'disk.image: {plain} is qcow2: say so in its [[disk]], format = "qcow2"'
        )
        assert refused(monitor, base, format="qcow2").endswith(
            'is raw: say so in its [[disk]], format = "raw"'
        )
        assert refused(monitor, base).endswith("is read-only in A's QEMU; it needs no migration")


def test_an_image_of_which_a_part_is_gone_is_refused_while_the_guest_still_has_it(images: Path) -> None:
    top, base = images / "top.qcow2", images / "base.raw"
    with opened(images, f"file={top},if=none,id=d,format=qcow2") as monitor:
        base.unlink()
        said = refused(monitor, top, format="qcow2")
    assert said.startswith(f"disk.image: {top} cannot be read on A without its QEMU: ")
    assert str(base) in said


def test_what_a_chain_holds_is_known_and_what_stays_in_it(images: Path) -> None:
    plain = images / "plain.qcow2"
    check("qemu-img", "snapshot", "-c", "before", plain)
    check("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", plain)
    with opened(images, f"file={plain},if=none,id=d,format=qcow2") as monitor:
        node, plan = looked_at(monitor, plain, format="qcow2"), plan_of(monitor, plain, format="qcow2")
        assert left_on_a(plan, [node]) == [f"the snapshots in {plain} (before) stay in that image, on A"]
        assert MIB <= clock.run(held(plan, plan.disks[0], HERE)) < 2 * MIB
    plan = plan_of(images / "a.qmp", images / "top.qcow2", format="qcow2")
    assert clock.run(held(plan, plan.disks[0], HERE)) >= 4 * MIB
