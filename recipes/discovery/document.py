"""A plan as TOML, with what an operator wants to know beside it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tomlkit
from tomlkit.items import Array, Item, Table

from nbdserve.common.sizes import format_size
from overlay.formats.device.map_place import is_among_devices
from recipes.discovery.derive import Derived
from recipes.discovery.drive_options import FoundDisk
from recipes.discovery.guest import Guest
from recipes.qemu.images import RAW


@dataclass(frozen=True)
class Place:
    """One side of a migration.

    host  ``ssh://...``, or nothing: this machine
    qmp   the monitor of the QEMU there
    """

    host: str
    qmp: str


@dataclass(frozen=True)
class Draft:
    """A plan that has been found, before it is written.

    targets    where each disk ends on B
    export     where A serves the disks
    migration  where B waits for the RAM
    channel    how both get there; empty: as a plan has it that does not say
    seeds      of each disk what B has of it already; an empty one is none, and so is an empty tuple
    policy     when the disks go; empty: as a plan has it that does not say
    cutover    when the guest does; the same
    verify     whether what was copied is compared on both hosts; None: as a plan has it that does not say
    overwrite  block devices on which there may be something
    """

    guest: Guest
    pid: int
    user: str
    derived: Derived
    source: Place
    destination: Place
    targets: tuple[str, ...]
    export: str
    migration: str
    channel: str = ""
    seeds: tuple[str, ...] = ()
    policy: str = ""
    cutover: str = ""
    verify: bool | None = None
    overwrite: tuple[str, ...] = ()

    @property
    def on_one_machine(self) -> bool:
        """Tell whether both QEMUs run on the same machine, as far as is known."""
        return self.source.host == self.destination.host and self.migration.startswith("unix:")


def write(draft: Draft) -> str:
    """Return the plan's file."""
    document = tomlkit.document()
    for line in _heading(draft):
        document.add(tomlkit.comment(_one_line(line)) if line else tomlkit.nl())
    document["source"] = _source(draft)
    disks = tomlkit.aot()
    seeds = draft.seeds or [""] * len(draft.targets)
    for found, target, seed in zip(draft.derived.disks, draft.targets, seeds, strict=True):
        disk = tomlkit.table()
        disk["image"] = _text(found.image, f"{format_size(found.size)}, {found.device}")
        disk["node"] = _text(found.node)
        if found.format != RAW:
            disk["format"] = _text(found.format, "as A has it; on B it is raw")
        on_device = is_among_devices(target)
        disk["target"] = _text(target, "a block device, which becomes the disk" if on_device else "")
        disk["drive"] = _text(found.drive)
        _add_opening(disk, found)
        if seed:
            disk["seed"] = _text(seed, "a copy that B has: what is the same in it is not sent")
        disks.append(disk)
    document["disk"] = disks
    if draft.derived.flash:
        chips = tomlkit.aot()
        for chip in draft.derived.flash:
            table = tomlkit.table()
            table["image"] = _text(chip.image, f"{format_size(chip.size)}, flash that the guest writes to")
            table["target"] = _text(chip.target, "made on B, and written as the guest arrives")
            chips.append(table)
        document["flash"] = chips
    export = tomlkit.table()
    export["uri"] = _text(draft.export, "where A serves its disks, and B finds them")
    document["export"] = export
    document["destination"] = _destination(draft)
    if draft.channel:
        channel = tomlkit.table()
        channel["kind"] = _text(draft.channel, "how disk and RAM get to B")
        document["channel"] = channel
    if draft.verify is not None:
        finish = tomlkit.table()
        verify = tomlkit.item(draft.verify)
        finish["verify"] = verify.comment(
            "compare what was copied on both hosts before A's image is given up"
        )
        document["finish"] = finish
    return tomlkit.dumps(document)


def _add_opening(disk: Table, found: FoundDisk) -> None:
    """Say how A's QEMU has it open, which B's does in the end, if it can."""
    if found.cache:
        cache = tomlkit.array()
        cache.extend(_text(each) for each in found.cache)
        disk["cache"] = cache.comment("as A's QEMU has it; B's from the pivot on")
    if found.aio:
        disk["aio"] = _text(found.aio, "the same")
    if found.detect_zeroes:
        disk["detect_zeroes"] = _text(found.detect_zeroes, "as in A's QEMU")


def _heading(draft: Draft) -> Iterable[str]:
    guest, derived = draft.guest, draft.derived
    name = guest.name or "a guest without a name"
    version = ".".join(str(number) for number in guest.version)
    machine = guest.machine
    processors = f"{machine.processors} processor{'s' if machine.processors > 1 else ''}"
    yield f"{name}: process {draft.pid} of {draft.user}, QEMU {version}, {machine.type},"
    yield f"{processors}, {format_size(machine.ram + machine.plugged)} of RAM"
    yield "Made by nbd-migrate plan, which has touched nothing. To do it: nbd-migrate run THIS-FILE"
    for heading, found in (
        ("Left out:", derived.notes),
        ("These must be on B as they are on A:", [str(each) for each in derived.local]),
        ("Only one QEMU on a machine can have these:", derived.busy if draft.on_one_machine else ()),
    ):
        if found:
            yield ""
            yield heading
            yield from (f"  {each}" for each in found)
    yield ""


def _source(draft: Draft) -> Table:
    table = tomlkit.table()
    table["qmp"] = _text(draft.source.qmp, "the monitor of A's QEMU")
    if draft.source.host:
        table["host"] = _text(draft.source.host)
    return table


def _destination(draft: Draft) -> Table:
    table = tomlkit.table()
    if draft.destination.host:
        table["host"] = _text(draft.destination.host)
    table["qmp"] = _text(draft.destination.qmp, "the monitor of B's QEMU")
    table["migration"] = _text(draft.migration, "where B's QEMU waits for the RAM")
    if draft.policy:
        table["policy"] = _text(draft.policy, "when the disks go: after the guest, or before it")
    if draft.cutover:
        table["cutover"] = _text(draft.cutover, "when the guest goes")
    if draft.derived.user:
        table["owner"] = _text(draft.derived.user, "who B's QEMU becomes, as A's")
    if draft.derived.same:
        same = tomlkit.array()
        for path in draft.derived.same:
            same.add_line(_text(path))
        same.add_line(indent="")
        table["same"] = same.comment("read-only in A's QEMU: B needs them as they are there")
    if draft.overwrite:
        array = tomlkit.array()
        array.extend(_text(path) for path in draft.overwrite)
        table["overwrite"] = array.comment("what is on it is lost")
    table["qemu"] = _command_line(draft.derived)
    return table


def _command_line(derived: Derived) -> Array:
    array = tomlkit.array()
    _add(array, [derived.program], "without its disks, -incoming and -qmp, which are added")
    for line in derived.lines:
        _add(array, line.option.words, line.note)
    array.add_line(indent="")
    return array


def _add(array: Array, words: Iterable[str], note: str) -> None:
    items: list[Item] = [_text(word) for word in words]
    array.add_line(*items, comment=_one_line(note) or None)


def _text(text: str, note: str = "") -> Item:
    """Return a string as it is easiest to read: with JSON in it, in single quotes."""
    literal = '"' in text or "\\" in text
    plain = literal and "'" not in text and text.isprintable()
    item = tomlkit.string(text, literal=True) if plain else tomlkit.item(text)
    if note:
        item.comment(_one_line(note))
    return item


def _one_line(text: str) -> str:
    """Return a text as a comment can have it: nothing in it may end the line."""
    return "".join(letter if letter.isprintable() else " " for letter in text).rstrip()
