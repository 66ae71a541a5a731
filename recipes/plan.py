"""What to migrate, from where to where: the plan, its TOML file and every check that needs no I/O.

[source]                                  the guest as it runs now
qmp = "/run/vm/a.qmp"                     QMP address of its QEMU: a socket's path, or "HOST:PORT"
image = "/var/lib/images/vm.raw"          its disk, raw, as host A sees it
node = "disk0"                            its block node or device; default: found by the image's name
shell = ["ssh", "a.example"]              prefix of every command that must run on A; default: this host
bin = "/opt/nbd-migrate/bin"              where A has nbdserve; default: beside this command, or A's PATH

[export]
uri = "nbd://192.0.2.1:10809/vm"          where A serves the disk and B finds it; or "nbd+unix:///vm?socket=/run/x"

[destination]                             the guest as it is going to run
qemu = ["qemu-system-x86_64", ..., "-device", "virtio-blk-pci,drive=disk0,rerror=stop,werror=stop"]
node = "disk0"                            the block node that this -device refers to
image = "/var/lib/images/vm.qed"          the overlay that is made there
engine = "qemu"                           who copies: B's "qemu", or "overlay" (nbd-overlay)
qmp = "/run/vm/b.qmp"                     QMP address of the QEMU that is started there
migration = "tcp:192.0.2.2:4444"          where it listens for the RAM: "tcp:HOST:PORT" or "unix:PATH"

[limits]                                  seconds, unless said otherwise; see Limits
[finish]                                  see Finish
[log]
directory = "/var/log/nbd-migrate"        where what is started writes, on A and B; default: beside the disk
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from nbdserve.errors import UsageError
from nbdserve.uri import NbdUri, parse_uri

Command = tuple[str, ...]

MAX_WAIT = 1_000_000
"""The longest wait in seconds, some eleven days."""

MAX_SOCKET = 107
"""The longest path of a Unix socket, in bytes."""

MAX_SPEED = (1 << 63) - 1
"""The most bytes per second that a block job can be told."""


@dataclass(frozen=True)
class Source:
    """The guest as it runs now, on host A."""

    qmp: str
    image: str
    node: str = ""
    shell: Command = ()
    bin: str = ""

    def check(self) -> None:
        """Raise UsageError if a value cannot be right."""
        check_monitor("source.qmp", self.qmp)
        check_absolute("source.image", self.image)


@dataclass(frozen=True)
class Export:
    """Where A serves its disk: an ``nbd://HOST:PORT/NAME`` or ``nbd+unix:///NAME?socket=PATH`` URI."""

    uri: str

    def check(self) -> None:
        """Raise UsageError if the URI is not one that nbdserve can listen on."""
        try:
            address = self.address
        except UsageError as error:
            raise UsageError(f"export.uri: {error}") from error
        if address.tls or address.user:
            raise UsageError(f"export.uri: {self.uri!r}: TLS and users are not possible here")
        if address.socket is not None and not address.socket.startswith("/"):
            raise UsageError(f"export.uri: {self.uri!r}: the socket must be an absolute path")

    @property
    def address(self) -> NbdUri:
        """The URI taken apart."""
        return parse_uri(self.uri)


@dataclass(frozen=True)
class Destination:
    """The guest as it is going to run, on host B.

    ``qemu`` is its command line without the migrated disk, without ``-incoming`` and without ``-qmp``: these
    three are added. Its ``-device`` refers to the disk as ``node`` and says ``rerror=stop,werror=stop``.
    """

    qemu: Command
    image: str
    qmp: str
    migration: str
    node: str = "disk0"
    shell: Command = ()
    bin: str = ""
    engine: str = "qemu"

    @property
    def overlay_socket(self) -> str:
        """Where nbd-overlay serves the disk to B's QEMU."""
        return f"{self.image}.nbd"

    @property
    def overlay_monitor(self) -> str:
        """nbd-overlay's own QMP socket."""
        return f"{self.image}.qmp"

    def check(self) -> None:
        """Raise UsageError if a value cannot be right."""
        check_monitor("destination.qmp", self.qmp)
        if self.engine not in ("qemu", "overlay"):
            raise UsageError(f"destination.engine: {self.engine!r} is neither qemu nor overlay")
        if self.engine == "overlay" and len(os.fsencode(self.overlay_monitor)) > MAX_SOCKET:
            raise UsageError(
                f"destination.image: {self.image!r} is too long for the sockets beside it; choose one "
                f"with which {self.overlay_monitor!r} has at most {MAX_SOCKET} bytes"
            )
        check_absolute("destination.image", self.image)
        if not self.qemu:
            raise UsageError("destination.qemu: give the QEMU command line of host B")
        for option in ("incoming", "qmp", "daemonize", "S"):
            if {f"-{option}", f"--{option}"}.intersection(self.qemu):
                raise UsageError(f"destination.qemu: leave -{option} out, that is taken care of here")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,19}", self.node):
            raise UsageError(
                f"destination.node: {self.node!r} is not usable: up to 20 letters, digits and ._- that begin "
                "with a letter, as in the -device of the disk"
            )
        kind, _, rest = self.migration.partition(":")
        if not ((kind == "unix" and rest.startswith("/")) or (kind == "tcp" and is_host_and_port(rest))):
            raise UsageError(
                f"destination.migration: {self.migration!r} is not usable: write tcp:HOST:PORT or unix:/PATH"
            )


@dataclass(frozen=True)
class Limits:
    """The longest waits, in seconds, and what bounds the stream.

    connect          until a monitor or an export accepts a connection
    command          one QMP command
    start            until a process that was started is ready
    migrate          sending the RAM while the guest runs
    switch_over      sending the rest while the guest stands still
    stall            streaming without one byte of progress
    recover          until a guest that waits for the export goes on, once the export is back
    stop             until a process that was told to end has ended
    reconnect_delay  how long B's QEMU holds a guest's request while the export is away (whole seconds)
    restarts         how often a server that died while streaming is started again (a number)
    speed            bandwidth of the stream in bytes per second; 0 is no limit
    """

    connect: float = 10.0
    command: float = 15.0
    start: float = 30.0
    migrate: float = 3600.0
    switch_over: float = 60.0
    stall: float = 300.0
    recover: float = 60.0
    stop: float = 30.0
    reconnect_delay: int = 10
    restarts: int = 5
    speed: int = 0

    def check(self) -> None:
        """Raise UsageError for a negative limit, a wait of no time at all, and what is out of all range."""
        for each in fields(self):
            value = getattr(self, each.name)
            most, unit = (MAX_SPEED, "bytes per second") if each.name == "speed" else (MAX_WAIT, "seconds")
            if math.isnan(value):
                raise UsageError(f"limits.{each.name}: nan is not a number of {unit}")
            if value < 0 or (value == 0 and isinstance(each.default, float)):
                raise UsageError(f"limits.{each.name}: {value} is too small")
            if value > most:
                raise UsageError(f"limits.{each.name}: {value} is too large: at most {most} {unit}")


@dataclass(frozen=True)
class Finish:
    """What happens at the end to the source's image: it is kept where it is, or moved to ``move_aside``."""

    move_aside: str = ""

    def check(self) -> None:
        """Raise UsageError if the path is not absolute."""
        if self.move_aside:
            check_absolute("finish.move_aside", self.move_aside)


@dataclass(frozen=True)
class Log:
    """Where the processes that are started write their output: a directory on the host of each."""

    directory: str = ""

    def check(self) -> None:
        """Raise UsageError if the path is not absolute."""
        if self.directory:
            check_absolute("log.directory", self.directory)


@dataclass(frozen=True)
class Plan:
    """One migration. Building it checks everything that can be checked without touching a host.

    Raises UsageError, one line that begins with ``section.key``.
    """

    source: Source
    export: Export
    destination: Destination
    limits: Limits = field(default_factory=Limits)
    finish: Finish = field(default_factory=Finish)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        for section in fields(self):
            getattr(self, section.name).check()
        if self.source.qmp == self.destination.qmp:
            raise UsageError(f"destination.qmp: {self.destination.qmp} is the source's monitor")
        if self.finish.move_aside and self.finish.move_aside == self.source.image:
            raise UsageError("finish.move_aside: this is the image's own path")


def load(path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None) -> Plan:
    """Read a plan file; ``overrides`` (section, then key) win over what the file says.

    Raises UsageError for a file that is not TOML, an unknown or missing key, a wrong type or a wrong value.
    """
    if path.exists() and not path.is_file():
        # Reading a FIFO could take for ever.
        raise UsageError(f"{path}: not a regular file; write the plan to one")
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    try:
        return build(document, overrides or {})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def build(document: Mapping[str, Any], overrides: Mapping[str, Mapping[str, object]]) -> Plan:
    """Make a Plan from nested mappings; see load()."""
    sections = get_type_hints(Plan)
    for name in document:
        if name not in sections:
            raise UsageError(f"[{name}]: no such section; there are {', '.join(sections)}")
    made = {}
    for name, kind in sections.items():
        values = document.get(name, {})
        if not isinstance(values, Mapping):
            raise UsageError(f"{name}: write it as a section, [{name}]")
        made[name] = section_of(kind, name, {**values, **overrides.get(name, {})})
    return Plan(**made)


def section_of(kind: type, section: str, values: Mapping[str, object]) -> Any:
    """Make one section's dataclass, checking its keys and their types."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UsageError(f"{section}.{key}: no such key; there are {', '.join(hints)}")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise UsageError(f"{section}.{missing[0]}: this is missing")
    return kind(**{key: typed(f"{section}.{key}", hints[key], value) for key, value in values.items()})


def typed(where: str, kind: object, value: object) -> object:
    """Return the value as a str, an int, a float or a tuple of str, whichever the key wants."""
    words = value if isinstance(value, (list, tuple)) else [value]
    nul = next((word for word in words if isinstance(word, str) and "\0" in word), None)
    if nul is not None:
        raise UsageError(f"{where}: {nul!r} has a NUL in it, which no path and no command line can have")
    if kind == Command:
        if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
            return tuple(value)
        raise UsageError(f"{where}: a list of strings is wanted")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    names = {float: "a number", int: "a whole number", str: "a string"}
    raise UsageError(f"{where}: {names[kind]} is wanted, not {value!r}")  # type: ignore[index]


def is_host_and_port(text: str) -> bool:
    """Whether the text is ``HOST:PORT`` with a port of 1 to 65535; an IPv6 host stands in brackets."""
    match = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):([0-9]{1,5})", text)
    return match is not None and 0 < int(match[1]) < 65536


def check_monitor(where: str, address: str) -> None:
    """Raise UsageError unless this is an absolute path or ``HOST:PORT``."""
    if not (address.startswith("/") or is_host_and_port(address)):
        raise UsageError(f"{where}: {address!r} is not usable: write a socket's absolute path or HOST:PORT")


def check_absolute(where: str, path: str) -> None:
    """Raise UsageError unless the path is absolute."""
    if not path.startswith("/"):
        raise UsageError(f"{where}: {path!r} must be an absolute path")
