"""What an option names that is on its host and does not move: files, interfaces, descriptors, ports. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from recipes.discovery.command_line.arguments import split
from recipes.discovery.command_line.chardevs import SHORT, Chardev, of_chardev, of_short
from recipes.discovery.command_line.options import KEYED, Option

FILES = ("kernel", "initrd", "dtb", "shim", "mem-path", "L")
"""Options whose argument is the path of a file or directory on the host."""

SEARCHED = ("bios", "option-rom")
"""Options whose file is looked for among QEMU's own, too, if it is named without a directory."""

MADE = ("pidfile", "D", "writeconfig")
"""Options whose argument is a file that QEMU makes."""

_RELATIVE = {
    "fsdev": ("path", "socket"),
    "fw_cfg": ("file",),
    "object": ("mem-path", "filename", "file", "dir"),
    "smbios": ("file",),
    "tpmdev": ("path",),
    "virtfs": ("path", "socket"),
}
"""Of options with keys those that are paths as they stand; others QEMU may find in its own directory."""

_NETWORK = ("netdev", "nic", "net")
_DESCRIPTORS = ("fd", "fds", "vhostfd", "vhostfds", "sock_fd", "sock-fd")
_PATHS = {"file", "filename", "mem-path", "path", "dir", "script", "downscript", "sock", "socket", "vhostdev"}


class Kind(Enum):
    """What it is."""

    FILE = "file"
    INTERFACE = "network interface"
    BRIDGE = "bridge"


@dataclass(frozen=True)
class Local:
    """Something that must be on B as it is on A: its kind, its name, and the option that names it."""

    kind: Kind
    name: str
    option: str

    @property
    def path(self) -> str:
        """Return the path that must be there."""
        return self.name if self.kind is Kind.FILE else f"/sys/class/net/{self.name}"

    def __str__(self) -> str:
        return f"the {self.kind.value} {self.name} of -{self.option}"


def made_keys(option: Option) -> tuple[str, ...]:
    """Return the keys of an option whose values are what QEMU makes at its start: sockets and files."""
    if option.name not in KEYED:
        return ()
    given, name = option.arguments, option.name
    keys: tuple[str, ...] = ()
    if name in _NETWORK:
        # Only a stream may also be what connects.
        kind = given.text("type")
        of_kind = {"stream": "addr" if given.is_on("server") else "", "dgram": "local"}
        end = of_kind.get(kind, "")
        keys = (f"{end}.path",) if end and not given.is_on(f"{end}.abstract") else ()
    elif name == "chardev":
        keys = ("path", "logfile") if of_chardev(given).made else ("logfile",)
    elif name == "spice":
        keys = ("addr",) if given.is_on("unix") else ()
    elif (name, given.text("qom-type")) == ("object", "filter-dump") or name == "trace":
        keys = ("file",)
    elif (name, given.text("driver")) == ("audiodev", "wav"):
        keys = ("path",)
    return tuple(key for key in keys if given.text(key))


def descriptor(option: Option) -> str:
    """Return the descriptor that whoever started QEMU has passed to it with this option; or nothing."""
    if option.name == "add-fd":
        return str(option)
    if option.name not in KEYED:
        return ""
    for key, value in option.arguments.values.items():
        last = key.rpartition(".")[2]
        if last in _DESCRIPTORS or "/dev/fdset/" in str(value) or str(value).startswith("fd:"):
            return f"-{option.name} {key}={value}"
    return ""


def needed(option: Option) -> Iterator[Local]:
    """Yield what must be on B for this option."""
    name, value = option.name, option.value or ""
    if name in FILES or (name in SEARCHED and "/" in value):
        yield from (Local(Kind.FILE, each, name) for each in value.split(",") if each.startswith("/"))
    elif name in SHORT:
        yield from _of_device(of_short(value), name)
    elif name == "chardev":
        # One that connects again and again may be there later.
        if not {"reconnect", "reconnect-ms"}.intersection(option.arguments.values):
            yield from _of_device(of_chardev(option.arguments), name)
    elif name in KEYED:
        if name in _NETWORK:
            yield from _of_network(option)
        made = made_keys(option)
        for key, each in option.arguments.values.items():
            if key not in made:
                yield from _of_value(name, key, str(each))


def _of_device(device: Chardev, name: str) -> Iterator[Local]:
    if device.path and not device.made and device.backend not in ("pty", "pipe"):
        yield Local(Kind.FILE, device.path, name)


def _of_network(option: Option) -> Iterator[Local]:
    given = option.arguments
    kind = given.text("type")
    if kind == "tap" and given.text("ifname") and given.text("script") == "no":
        # With a script QEMU makes the interface itself.
        yield Local(Kind.INTERFACE, given.text("ifname"), option.name)
    if kind == "bridge" or (kind == "tap" and given.text("helper")):
        yield Local(Kind.BRIDGE, given.text("br", "br0"), option.name)


def _of_value(name: str, key: str, value: str) -> Iterator[Local]:
    last = key.rpartition(".")[2]
    if value.startswith("/") and (last in _PATHS or last.endswith(("file", "path", "dir"))):
        yield Local(Kind.FILE, value, name)
    elif last == "host" and name == "device" and re.fullmatch(r"[0-9a-f:.]+", value):
        yield Local(
            Kind.FILE, f"/sys/bus/pci/devices/{value if value.count(':') > 1 else '0000:' + value}", name
        )


def relative(option: Option, directory: str) -> Option:
    """Return the option with an absolute path in the place of one that is relative to a directory."""
    value = option.value or ""
    if option.name in (*FILES, *MADE) and value and not value.startswith("/"):
        return Option(option.name, posixpath.normpath(posixpath.join(directory, value)))
    keys = _RELATIVE.get(option.name, ())
    given = option.arguments if keys else None
    named = {key: path for key in keys if given and (path := given.text(key)) and not path.startswith("/")}
    if given is None or not named:
        return option
    absolute = {key: posixpath.normpath(posixpath.join(directory, path)) for key, path in named.items()}
    return option.having(given.having(**absolute))


def shared_memory(options: Sequence[Option]) -> Iterator[str]:
    """Yield the files of a guest's RAM of which every QEMU that has them sees the same, at once.

    What a guest shares with other programs (ivshmem) is left out: that is meant so.
    """
    of_others = {
        option.arguments.text("memdev")
        for option in options
        if option.name == "device" and option.arguments.text("driver").startswith("ivshmem")
    }
    for option in options:
        if option.name != "object" or option.arguments.text("qom-type") != "memory-backend-file":
            continue
        given = option.arguments
        if given.is_on("share") and given.text("id") not in of_others:
            yield given.text("mem-path")


def ports(option: Option) -> Iterator[str]:
    """Yield what two QEMUs on one machine cannot both listen on."""
    name, value = option.name, option.value or ""
    if name == "s":
        yield "TCP port 1234 of -s"
    elif name == "vnc" and (match := re.match(r"[^,/]*:(\d+)(,|$)", value)) and ",to=" not in value:
        yield f"the VNC display :{match[1]}"
    elif name == "spice":
        given = option.arguments
        yield from (
            f"the SPICE {key} {given.text(key)}" for key in ("port", "tls-port") if key in given.values
        )
    elif name == "chardev" and option.arguments.text("localport"):
        yield f"UDP port {option.arguments.text('localport')} of -{name}"
    elif name in SHORT or name == "chardev":
        device = of_chardev(option.arguments) if name == "chardev" else of_short(value)
        if device.server and device.address:
            yield f"{device.address} of -{name}"
    elif name in _NETWORK:
        for word in split(value):
            if word.startswith(("hostfwd=", "listen=", "localaddr=")):
                yield f"{word} of -{name}"
        given = option.arguments
        if "addr.port" in given.values and given.is_on("server"):
            yield f"{given.text('addr.host')}:{given.text('addr.port')} of -{name}"
