"""Character devices are understood, and renamed, in both ways of writing."""

from __future__ import annotations

import pytest

from recipes.discovery.command_line.chardevs import Chardev, monitors, moved, of_short, spelled_out
from recipes.discovery.command_line.options import parse


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("unix:/x,server,nowait", Chardev("socket", path="/x", server=True)),
        ("unix:/x,server=on,wait=off", Chardev("socket", path="/x", server=True)),
        ("mon:unix:/x", Chardev("socket", path="/x")),
        ("tcp::4444,server", Chardev("socket", address=":4444", server=True)),
        ("telnet:127.0.0.1:1,server=on", Chardev("socket", address="127.0.0.1:1", server=True)),
        ("file:/a,b", Chardev("file", path="/a,b")),
        ("mon:stdio", Chardev("stdio")),
        ("/dev/ttyS0", Chardev("serial", path="/dev/ttyS0")),
        ("pty", Chardev("pty")),
        ("chardev:c0", Chardev("chardev")),
    ],
)
def test_the_short_way_is_understood(text: str, device: Chardev) -> None:
    assert of_short(text) == device


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("unix:/x,server,nowait", "unix:/x.b,server=on,wait=off"),
        ("mon:unix:/a,,b,server=on", "mon:unix:/a,,b.b,server=on"),
        ("file:/x", "file:/x.b"),
        ("unix:/x", "unix:/x"),
        ("tcp::1,server", "tcp::1,server"),
        ("stdio", "stdio"),
    ],
)
def test_only_what_qemu_makes_is_renamed(text: str, after: str) -> None:
    assert moved(text, lambda path: f"{path}.b") == after


def test_the_short_way_is_spelled_out() -> None:
    assert str(spelled_out("unix:/x,server", "m")) == "socket,id=m,path=/x,server=on,wait=off"
    assert str(spelled_out("tcp:[::1]:4,server", "m")) == "socket,id=m,port=4,host=::1,server=on,wait=off"


def test_monitors_are_found_however_they_are_made() -> None:
    line = (
        "qemu -qmp unix:/1,server -chardev socket,id=c,path=/2,server=on -mon chardev=c,mode=control "
        "-chardev socket,id=h,path=/3,server=on -mon h -monitor unix:/4,server "
        "-chardev socket,id=d,path=/5,server=on -qmp chardev:d"
    )
    assert [each.device.path for each in monitors(parse(line.split()))] == ["/1", "/2", "/5"]
