"""Who uses a guest's only monitor is told by its command line."""

from __future__ import annotations

import shlex

from recipes.discovery.command_line.options import parse
from recipes.discovery.managed import busy, is_libvirts
from tests.unit.recipes.discovery.real_lines import BY_SCRIPT, LIBVIRT, PROXMOX


def test_libvirt_is_recognised_and_nobody_else_is_taken_for_it() -> None:
    assert is_libvirts(parse(shlex.split(LIBVIRT)))
    assert not is_libvirts(parse(shlex.split(PROXMOX)))
    assert "is libvirt's, which uses its only monitor itself; move it with virsh migrate" in busy(
        parse(shlex.split(LIBVIRT)), "vm"
    )


def test_other_monitors_are_named() -> None:
    assert busy(parse(shlex.split(BY_SCRIPT)), "vm").startswith(
        "/run/vm.qmp is its only monitor, and another"
    )
    assert "has no QMP monitor; start it with -qmp unix:PATH" in busy(parse(["qemu", "-S"]), "vm")
    two = parse(["qemu", "-qmp", "unix:/1,server", "-qmp", "unix:/2,server"])
    assert busy(two, "vm").startswith("/1 and /2 are its monitors, and another client is connected")
