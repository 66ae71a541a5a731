"""Character devices, written as ``-chardev socket,...`` or as ``-serial unix:PATH,server``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recipes.discovery.command_line import arguments
from recipes.discovery.command_line.arguments import Arguments
from recipes.discovery.command_line.options import CommandLine, Option

SHORT = ("serial", "parallel", "monitor", "qmp", "qmp-pretty", "gdb", "debugcon")
"""Options whose argument is written in the short way."""

_NETWORK = ("tcp", "telnet", "tn3270", "websocket")

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Chardev:
    """Where a character device leads.

    backend   as QEMU calls it: socket, file, pipe, stdio, pty ...
    path      of the file or the Unix socket
    address   HOST:PORT of the TCP socket, or @NAME in Linux's abstract namespace
    server    whether QEMU itself listens there
    """

    backend: str
    path: str = ""
    address: str = ""
    server: bool = False

    @property
    def made(self) -> str:
        """Return the path of what QEMU makes at its start: a socket that it listens on, a file, or the name
        of a terminal.
        """
        return self.path if self.server or self.backend in ("file", "pty") else ""

    @property
    def listens(self) -> str:
        """Return where QEMU listens: a path, or HOST:PORT; nothing if it does not."""
        return (self.path or self.address) if self.server else ""


def of_chardev(given: Arguments) -> Chardev:
    """Return what a ``-chardev`` says."""
    backend = given.text("backend")
    if backend != "socket":
        return Chardev(backend, path=given.text("path"))
    if "path" in given.values:
        return _at_path(given)
    address = f"{given.text('host')}:{given.text('port')}"
    return Chardev(backend, address=address, server=given.is_on("server"))


def _at_path(given: Arguments) -> Chardev:
    path, server = given.text("path"), given.is_on("server")
    if given.is_on("abstract"):
        return Chardev("socket", address=f"@{path}", server=server)
    return Chardev("socket", path=path, server=server)


def of_short(text: str) -> Chardev:
    """Return what an option such as ``-serial`` says."""
    backend, _, rest = text.removeprefix("mon:").partition(":")
    if backend in ("file", "pipe"):
        return Chardev(backend, path=rest)
    if backend == "unix":
        return _at_path(arguments.parse(rest, "path"))
    if backend in _NETWORK:
        given = arguments.parse(rest, "address")
        return Chardev("socket", address=given.text("address"), server=given.is_on("server"))
    if text.startswith("/"):
        return Chardev("serial", path=text)
    return Chardev(backend)


def moved(text: str, rename: Rename) -> str:
    """Return the argument of an option such as ``-serial`` with another name for what QEMU makes."""
    device = of_short(text)
    if not device.made:
        return text
    mux = "mon:" if text.startswith("mon:") else ""
    if device.backend == "file":
        return f"{mux}file:{rename(device.path)}"
    rest = text.removeprefix(f"{mux}unix:")
    return f"{mux}unix:{arguments.parse(rest, 'path').having(path=rename(device.path))}"


@dataclass(frozen=True)
class Monitor:
    """A QMP monitor of a command line, and the options that make it."""

    device: Chardev
    options: tuple[Option, ...]


def monitors(command: CommandLine) -> Iterator[Monitor]:
    """Yield the QMP monitors."""
    chardevs = {each.arguments.text("id"): each for each in command.named("chardev")}
    for option in command.options:
        if option.name in ("qmp", "qmp-pretty") and option.value:
            kind, _, name = option.value.partition(":")
            if kind != "chardev":
                yield Monitor(of_short(option.value), (option,))
            elif name in chardevs:
                yield Monitor(of_chardev(chardevs[name].arguments), (option, chardevs[name]))
        elif option.name == "mon" and option.arguments.text("mode") == "control":
            name = option.arguments.text("chardev")
            if name in chardevs:
                yield Monitor(of_chardev(chardevs[name].arguments), (option, chardevs[name]))


def spelled_out(short: str, name: str) -> Arguments:
    """Return what is written in the short way as a ``-chardev`` of this name."""
    device = of_short(short)
    values = {"backend": device.backend, "id": name}
    if device.path:
        values["path"] = device.path
    if device.address:
        host, _, values["port"] = device.address.rpartition(":")
        values["host"] = host.strip("[]")
    if device.server:
        values |= {"server": "on", "wait": "off"}
    return Arguments(values, "backend")
