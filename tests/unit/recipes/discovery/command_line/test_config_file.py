"""What -readconfig reads is a list of options, or a line of it is refused."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.config_file import parse

FILE = """
# comment
[machine]
  type = "pc"
  accel = "tcg"

[memory]
  size = "2G"

[smp-opts]
  cpus = "4"

[chardev "mon0"]
  backend = "socket"
  path = "/run/a,b.qmp"
  server = "on"

[device "disk"]
  driver = "virtio-blk-pci"
  drive = "d0"
"""


def test_each_group_is_an_option() -> None:
    assert [str(option) for option in parse(FILE, "vm.cfg")] == [
        "-machine pc,accel=tcg",
        "-m 2G",
        "-smp 4",
        "-chardev socket,id=mon0,path=/run/a,,b.qmp,server=on",
        "-device virtio-blk-pci,id=disk,drive=d0",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[frob]\n", r"vm.cfg:1: the group \[frob\] is not known"),
        ('x = "y"\n', "vm.cfg:1: .* is not understood"),
        ("[machine]\n type: pc\n", "vm.cfg:2: .* is not understood"),
        ('[netdev "n"]\n hostfwd = "a"\n hostfwd = "b"\n', "vm.cfg:3: .* is not understood"),
    ],
)
def test_a_line_that_is_not_understood_is_named(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(text, "vm.cfg")
