"""What a running guest is, as its QEMU's monitor tells it. Asks, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.errors import MigrationError
from recipes.plans.disks import CACHE
from recipes.qemu.images import chain_of, fault_in, file_of
from recipes.qemu.machine import Machine, machine_of
from recipes.qemu.vm import CommandError, Vm

ADDRESSES = ("addr", "unit", "channel", "scsi-id", "lun")
"""The properties of a device that say where on its bus it is."""

_BACKEND = "/virtio-backend"
_PERIPHERAL = "/machine/peripheral/"
_ANONYMOUS = "/machine/peripheral-anon"


@dataclass(frozen=True)
class Node:
    """What is in a drive: a block node, the file that it says it has, and its size in bytes."""

    name: str
    driver: str
    file: str
    size: int
    read_only: bool = False
    limited: str = ""
    """Which throttling it has, or nothing."""
    fault: str = ""
    """Why its image cannot be read without this QEMU, or nothing."""
    below: tuple[str, ...] = ()
    """The files of the images below it."""
    cache: tuple[str, ...] = ()
    """How it goes about the page cache, see PlannedDisk."""
    detect_zeroes: str = "off"


@dataclass(frozen=True)
class Drive:
    """A device for a disk, a CD or a diskette, and what is in it.

    backend    the name of its block backend, as of a ``-drive``; may be empty
    path       of the device in QEMU's object model; empty for a drive that no device uses
    type       of the device, as ``virtio-blk-pci``
    bus        the name of its bus, as ``ide.0``
    address    where it is on that bus, by property
    waits      whether it can stop the guest when a request fails
    """

    backend: str
    path: str = ""
    type: str = ""
    bus: str = ""
    address: tuple[tuple[str, int], ...] = ()
    waits: bool = False
    removable: bool = False
    node: Node | None = None

    @property
    def id(self) -> str:
        """Return the device's own name; empty where it has none."""
        rest = self.path.removeprefix(_PERIPHERAL)
        return "" if rest == self.path else rest.partition("/")[0]

    @property
    def anonymous(self) -> int:
        """Return which of the devices without a name it is; -1 for one that has a name, or is built in."""
        rest = self.path.removeprefix(f"{_ANONYMOUS}/device[")
        return -1 if rest == self.path else int(rest.partition("]")[0])


@dataclass(frozen=True)
class Guest:
    """A guest that runs.

    version    of its QEMU, as (7, 2, 22)
    drives     all of them, the built-in ones too
    plugged    the names of its devices that have one
    anonymous  the types of those that have none, in the order in which they were made
    blocked    why QEMU cannot migrate it
    """

    version: tuple[int, int, int]
    machine: Machine
    state: str
    name: str
    drives: tuple[Drive, ...]
    plugged: tuple[str, ...] = ()
    anonymous: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    window: bool = False
    """Whether its display may be a window on its host: there is neither VNC nor SPICE."""


async def look(vm: Vm) -> Guest:
    """Ask a QEMU what its guest is. Raises MigrationError."""
    version = (await vm.execute("query-version"))["qemu"]
    return Guest(
        version=(version["major"], version["minor"], version["micro"]),
        machine=await machine_of(vm),
        state=str((await vm.execute("query-status"))["status"]),
        name=str((await vm.execute("query-name")).get("name", "")),
        drives=tuple([await drive(vm, each) for each in await vm.execute("query-block")]),
        plugged=tuple([name for name, _ in await children(vm, _PERIPHERAL.rstrip("/"))]),
        anonymous=tuple([kind for _, kind in await children(vm, _ANONYMOUS)]),
        blocked=tuple((await vm.execute("query-migrate")).get("blocked-reasons", ())),
        window=not await served_display(vm),
    )


async def drive(vm: Vm, found: dict[str, Any]) -> Drive:
    """Make a Drive of an entry of query-block, and ask for what that does not tell of the device."""
    backend, node = found["device"], node_of(found["inserted"]) if "inserted" in found else None
    path = found.get("qdev", "")
    if not path:
        return Drive(backend, removable=found["removable"], node=node)
    path = (path if path.startswith("/") else f"{_PERIPHERAL}{path}").removesuffix(_BACKEND)
    kind = await property_of(vm, path, "type")
    if kind is None:
        raise MigrationError(f"{vm.name} does not tell what the device {path} is")
    places = [(name, await property_of(vm, path, name)) for name in ADDRESSES]
    return Drive(
        backend,
        path,
        kind,
        bus=str(await property_of(vm, path, "parent_bus") or "").rpartition("/")[2],
        address=tuple([(name, place) for name, place in places if isinstance(place, int)]),
        waits=await property_of(vm, path, "rerror") is not None,
        removable=found["removable"],
        node=node,
    )


def node_of(inserted: dict[str, Any]) -> Node:
    """Make a Node of what query-block says of a medium."""
    throttling = [f"{key}={inserted[key]}" for key in ("bps", "iops") if inserted.get(key)]
    throttling += [
        f"{key}={inserted[key]}" for key in ("bps_rd", "bps_wr", "iops_rd", "iops_wr") if inserted.get(key)
    ]
    return Node(
        name=inserted["node-name"],
        driver=inserted["drv"],
        file=file_of(inserted["file"]),
        size=inserted["image"]["virtual-size"],
        read_only=inserted["ro"],
        limited=",".join(throttling),
        fault=fault_in(inserted["image"]),
        below=tuple(layer.file for layer in chain_of(inserted["image"])[1:]),
        cache=tuple(key for key in CACHE if inserted.get("cache", {}).get(key)),
        detect_zeroes=inserted.get("detect_zeroes", "off"),
    )


async def property_of(vm: Vm, path: str, name: str) -> Any:
    """Return a property of an object; None where it has none of this name."""
    try:
        return await vm.execute("qom-get", path=path, property=name)
    except CommandError:
        return None


async def children(vm: Vm, path: str) -> list[tuple[str, str]]:
    """Return name and type of what is below an object, in the order in which it was made."""
    try:
        listed = await vm.execute("qom-list", path=path)
    except CommandError:
        return []
    found = [(each["name"], each["type"]) for each in listed if each["type"].startswith("child<")]
    named = [(name, kind.removeprefix("child<").removesuffix(">")) for name, kind in found]
    return sorted(named, key=lambda each: _number(each[0]))


def _number(name: str) -> int:
    number = name.removeprefix("device[").removesuffix("]")
    return int(number) if number.isdecimal() else 0


async def served_display(vm: Vm) -> bool:
    """Tell whether the guest's display is served by VNC or SPICE."""
    for command in ("query-vnc", "query-spice"):
        try:
            if (await vm.execute(command)).get("enabled"):
                return True
        except CommandError:
            # It was built without that.
            continue
    return False
