"""The file that is written is a plan, with what was found beside it."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from recipes.discovery.document import Draft, Place, write
from recipes.plans.planfile import build
from tests.unit.recipes.discovery.test_derive import VIRTIO, derived, guest, has

LINE = (
    "/usr/bin/qemu-system-x86_64 -device virtio-rng-pci -fw_cfg name=opt/x,file=/f -runas vm -loadvm s "
    """-object '{"qom-type": "iothread", "id": "i"}' -smbios "type=1,serial=it's \\"x\\"" """
    "-drive if=virtio,file=/images/vm.raw -chardev socket,id=s,port=1,server=on -serial chardev:s"
)


def draft() -> Draft:
    """A guest with one disk, and everything that is told."""
    found = guest(has(VIRTIO), name="a guest\nof two lines")
    return Draft(
        guest=found,
        pid=4711,
        user="root",
        derived=derived(LINE, found),
        source=Place("", "/run/a.qmp"),
        destination=Place("", "/run/b.qmp"),
        targets=("/there/vm.raw",),
        export="nbd+unix:///disk?socket=/there/vm.raw.export",
        migration="unix:/there/vm.raw.ram",
    )


def test_what_is_written_is_a_plan_with_all_that_was_found() -> None:
    made = draft()
    plan = build(tomllib.loads(write(made)), {})
    assert plan.source.qmp == "/run/a.qmp"
    assert plan.destination.owner == "vm"
    words = [word for line in made.derived.lines for word in line.option.words]
    assert plan.destination.qemu == ("/usr/bin/qemu-system-x86_64", *words)
    assert """type=1,serial=it's "x\"""" in plan.destination.qemu


def test_what_the_operator_has_chosen_is_in_the_plan() -> None:
    chosen = dataclasses.replace(draft(), policy="hybrid", cutover="at-window 5", channel="plain")
    plan = build(tomllib.loads(write(chosen)), {})
    assert plan.hybrid
    assert (plan.cutover.window, plan.channel.kind) == (5.0, "plain")
    assert not build(tomllib.loads(write(draft())), {}).hybrid


def test_how_a_has_a_disk_open_is_in_the_plan() -> None:
    made = draft()
    [disk] = made.derived.disks
    opened = dataclasses.replace(disk, cache=("direct",), aio="native", detect_zeroes="unmap")
    text = write(dataclasses.replace(made, derived=dataclasses.replace(made.derived, disks=(opened,))))
    [planned] = build(tomllib.loads(text), {}).disks
    assert planned.opening == {"cache": {"direct": True, "no-flush": False}, "aio": "native"}
    assert planned.guests == {"detect-zeroes": "unmap"}
    assert "as A's QEMU has it; B's from the pivot on" in text
    [plain] = build(tomllib.loads(write(made)), {}).disks
    assert plain.opening == plain.guests == {}


def test_what_the_operator_has_to_know_stands_in_comments() -> None:
    comments = [line for line in write(draft()).splitlines() if line.startswith("#")]
    assert comments == [
        "# a guest of two lines: process 4711 of root, QEMU 7.2.22, pc-i440fx-7.2,",
        "# 1 processor, 16 MiB of RAM",
        "# Made by nbd-migrate plan, which has touched nothing. To do it: nbd-migrate run THIS-FILE",
        "# Left out:",
        "#   -loadvm s, which was for A's start",
        "# These must be on B as they are on A:",
        "#   the file /f of -fw_cfg",
        "# Only one QEMU on a machine can have these:",
        "#   :1 of -chardev",
    ]
    apart = dataclasses.replace(draft(), destination=Place("ssh://b", "/run/b.qmp"))
    assert "Only one QEMU" not in write(apart)


@pytest.mark.parametrize("verify", [True, False, None])
def test_whether_the_copy_is_compared_is_written_where_it_was_said(verify: bool | None) -> None:
    document = tomllib.loads(write(dataclasses.replace(draft(), verify=verify)))
    assert document.get("finish", {}).get("verify") is verify
