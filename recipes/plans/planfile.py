"""The plan's TOML file, and what an operator may have got wrong in it.

[source]                                  the guest as it runs now
qmp = "/run/vm/a.qmp"                     QMP address of its QEMU: a socket's path, or "HOST:PORT"
image = "/var/lib/images/vm.raw"          its disk, raw, as host A sees it
node = "disk0"                            its block node or device; default: found by the image's name
host = "ssh://root@a.example:22"          host A; default: this host
shell = ["sudo"]                          or a prefix of every command that must run on A
bin = "/opt/nbd-migrate/bin"              where A has nbdserve; default: A's PATH, or where this command is

[export]
uri = "nbd://192.0.2.1:10809/vm"          where A serves the disk and B finds it; or "nbd+unix:///vm?socket=/run/x"

[destination]                             the guest as it is going to run
qemu = ["qemu-system-x86_64", ..., "-device", "virtio-blk-pci,drive=disk0,rerror=stop,werror=stop"]
node = "disk0"                            the block node that this -device refers to
image = "/var/lib/images/vm.raw"          the image that is made there, which is a raw disk in the end
seed = "/var/lib/images/yesterday.raw"    a raw copy of the disk on B: what is the same in it is not sent
engine = "overlay"                        who copies: "overlay" (the default), or B's "qemu"
policy = "postcopy"                       when the disk goes: after the guest, or before it: "hybrid"
cutover = "auto"                          with hybrid, when the guest goes: see policy.py
qmp = "/run/vm/b.qmp"                     QMP address of the QEMU that is started there
owner = "libvirt-qemu:kvm"                who that QEMU runs as, if not who starts it; mode: of its files
same = ["/srv/iso/tools.iso"]             files of its read-only drives, which must be as they are on A
overwrite = ["/dev/vg/vm"]                block devices, targets of disks, with something on them: it is lost
migration = "tcp:192.0.2.2:4444"          where it listens for the RAM: "tcp:HOST:PORT" or "unix:PATH"

[[disk]]                                  in the place of source.image and node, destination.image and node;
image = "/var/lib/images/vm.raw"          once for each disk that moves: where it is on A,
target = "/var/lib/images/vm.raw"         the image that is made on B, or a block device, as "/dev/vg/vm";
state = "/var/lib/nbd-migrate/dev-vg-vm"  the directory on B for what belongs to that; default: see places.py;
drive = "disk0"                           the block node that a -device there refers to,
node = "disk0"                            and A's block node or device, as above;
format = "raw"                            of the image on A: "raw" (the default) or "qcow2";
seed = "/var/lib/images/yesterday.raw"    and a copy that B has;
cache = ["direct"]                        how B's QEMU opens the target in the end: "direct", "no-flush",
aio = "native"                            "threads", "native" or "io_uring",
detect_zeroes = "unmap"                   and what becomes of zeros that the guest writes: "on", "unmap"

[[flash]]                                 a flash chip that the guest writes to: its firmware's variables
image = "/var/lib/images/vm.vars.fd"      on A,
target = "/var/lib/images/vm.vars.fd"     and the file that is made on B, which destination.qemu names

[channel]
kind = "tls"                              how disk and RAM get to B: "tls", "ssh", "single" or "plain"
address = "tcp:192.0.2.2:4444"            where B listens, of "single"; default: destination.migration

[limits]                                  seconds, unless said otherwise; see Limits
[finish]                                  see Finish
verify = true                             compare what was copied on both hosts before A's image is given up
[hooks]                                   command lines, see Hooks
[log]
directory = "/var/log/nbd-migrate"        where what is started writes, on A and B; default: see places.py

Here are checked the sections, the keys and their types; what a value may be is checked by each section's
``check`` in plan.py, and what the hosts say of it by steps/preflight.py.
"""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from nbdserve.common.errors import UsageError
from recipes.plans.channel import BETWEEN_SOCKETS
from recipes.plans.limits import GONE
from recipes.plans.plan import TABLES, Command, Plan
from recipes.plans.sockets import between_sockets

_MOST_BITS = 1000
"""Of a whole number that can be shown, and be a float."""


def load(path: Path, overrides: Mapping[str, Mapping[str, object]] | None = None) -> Plan:
    """Read a plan file; ``overrides`` (section, then key) win over what the file says.

    Raises UsageError for a file that is not TOML, an unknown or missing key, a wrong type or a wrong value.
    """
    if path.exists() and not path.is_file():
        # Reading a FIFO could take for ever.
        raise UsageError(f"{path}: not a regular file; write the plan to one")
    try:
        document = tomllib.loads(decoded(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        # Beside what is wrong TOML: what is no text, numbers of thousands of digits, lists without an end.
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    try:
        return build(document, overrides or {})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def decoded(content: bytes) -> str:
    """Return the text of a TOML file, which is UTF-8; editors on other systems put a mark before it, or
    use UTF-16.

    Raises UnicodeDecodeError.
    """
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf_16 else "utf-8-sig")


def build(document: Mapping[str, Any], overrides: Mapping[str, Mapping[str, object]]) -> Plan:
    """Make a Plan from nested mappings; see load()."""
    sections = get_type_hints(Plan)
    for name in document:
        if name not in sections:
            raise UsageError(f"[{name}]: no such section; there are {', '.join(sections)}")
    made: dict[str, Any] = {
        name: tables_of(name, kind, document.get(name, [])) for name, kind in TABLES.items()
    }
    for name, kind in sections.items():
        if name in made:
            continue
        values = document.get(name, {})
        if not isinstance(values, Mapping):
            raise UsageError(f"{name}: write it as a section, [{name}]")
        made[name] = section_of(kind, name, {**values, **overrides.get(name, {})})
    plan = Plan(**made)
    return between_sockets(plan) if plan.channel.kind in BETWEEN_SOCKETS else plan


def tables_of(name: str, kind: type, tables: object) -> tuple[Any, ...]:
    """Make what TOML has for a section that may be there several times, as [[disk]]."""
    if not isinstance(tables, list) or not all(isinstance(each, Mapping) for each in tables):
        raise UsageError(f"{name}: write it as [[{name}]], once for each {name}")
    found = []
    for number, values in enumerate(tables, start=1):
        try:
            found.append(section_of(kind, name, values))
        except UsageError as error:
            raise UsageError(f"{error}, in [[{name}]] number {number}") from error
    return tuple(found)


def section_of(kind: type, section: str, values: Mapping[str, object]) -> Any:
    """Make one section's dataclass, checking its keys and their types."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    for key in values:
        if section == "limits" and key in GONE:
            raise UsageError(f"{section}.{key}: there is no such limit any more: {GONE[key]}; leave it out")
        if key not in hints:
            raise UsageError(f"{section}.{key}: no such key; there are {', '.join(hints)}")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise UsageError(f"{section}.{missing[0]}: this is missing")
    return kind(**{key: typed(f"{section}.{key}", hints[key], value) for key, value in values.items()})


def typed(where: str, kind: object, value: object) -> object:
    """Return the value as a str, an int, a float or a tuple of str, whichever the key wants."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise UsageError(f"{where}: no number can be as large as this one")
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
    if kind == (bool | None) and isinstance(value, bool | None):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    names = {float: "a number", int: "a whole number", str: "a string", bool | None: "true or false"}
    given = "a section" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    raise UsageError(f"{where}: {names[kind]} is wanted, not {given}")  # type: ignore[index]
