"""A command line is a list of options, or one of them is refused by its name."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.options import Option, parse


def test_options_with_and_without_an_argument_are_told_apart() -> None:
    command = parse(["/usr/bin/kvm", "-nodefaults", "--name", "vm", "-M", "pc", "-S", "disk.raw"])
    assert command.program == "/usr/bin/kvm"
    assert list(command.options) == [
        Option("nodefaults"),
        Option("name", "vm"),
        Option("machine", "pc"),
        Option("S"),
        Option("hda", "disk.raw"),
    ]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["qemu", "-frobnicate", "x"], "the option -frobnicate is not known here"),
        (["qemu", "-name"], "-name has no argument"),
        ([], "no command line"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(argv: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(argv)


def test_set_changes_what_it_names() -> None:
    argv = ["qemu", "-device", "virtio-blk,id=d,drive=a", "-set", "device.d.serial=x,y"]
    assert list(parse(argv).settled().options) == [Option("device", "virtio-blk,id=d,drive=a,serial=x,,y")]
    with pytest.raises(UsageError, match=r"-set device\.e\.serial=x changes no option"):
        parse(["qemu", "-set", "device.e.serial=x"]).settled()
