"""What to migrate, from where to where, and every check of it that needs no I/O. Its file: planfile.py."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field, fields, replace

from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import parse_mode
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri, parse_uri
from recipes.connections.address import check_host, check_listening, is_host_and_port, ssh_words
from recipes.hosts.ssh import sessions
from recipes.plans.channel import SINGLE, SSH, TLS, Channel
from recipes.plans.disks import SHORTHAND, PlannedDisk, check_path, check_together
from recipes.plans.flash import PlannedFlash
from recipes.plans.hooks import Hooks
from recipes.plans.limits import Limits
from recipes.plans.policy import AUTO, HYBRID, POLICIES, POSTCOPY, Cutover, parse_cutover
from recipes.qemu.images import RAW

Command = tuple[str, ...]

TABLES: dict[str, type] = {"disk": PlannedDisk, "flash": PlannedFlash}
"""Sections that a plan may have several times, and what each of them is."""


@dataclass(frozen=True)
class Source:
    """The guest as it runs now, on host A; ``image`` and ``node`` are those of its only disk."""

    qmp: str
    image: str = ""
    node: str = ""
    host: str = ""
    shell: Command = ()
    bin: str = ""

    def check(self) -> None:
        """Raise UsageError if a value cannot be right."""
        check_place("source", self.host, self.shell)
        check_monitor("source.qmp", self.qmp)


@dataclass(frozen=True)
class Export:
    """Where A serves its disks: an ``nbd://HOST:PORT/NAME`` or ``nbd+unix:///NAME?socket=PATH`` URI."""

    uri: str

    def check(self) -> None:
        """Raise UsageError if the URI is not one that nbdserve can listen on."""
        try:
            address = self.address
        except UsageError as error:
            raise UsageError(f"export.uri: {error}") from error
        if address.tls or address.user:
            raise UsageError(f"export.uri: {self.uri!r}: TLS and users are not possible here")
        if address.socket is not None:
            check_path("export.uri", address.socket)

    @property
    def address(self) -> NbdUri:
        """Return the URI taken apart."""
        return parse_uri(self.uri)


@dataclass(frozen=True)
class Destination:
    """The guest as it is going to run, on host B.

    ``qemu`` is its command line without the migrated disks, without ``-incoming`` and without ``-qmp``: these
    three are added. Its ``-device`` refers to a disk by its drive and says ``rerror=stop,werror=stop``.
    ``owner`` (USER, USER:GROUP or :GROUP) and ``mode`` (octal) are those of the images and of the sockets to
    them, for a QEMU that runs as another user. ``same`` are files that ``qemu`` names, and that must be on B
    as they are on A, under the same paths. ``overwrite`` are block devices on which there may be something,
    which is lost. ``image``, ``node`` and ``seed`` are those of its only disk.
    ``policy`` says when the disks go there, ``cutover`` when the guest does (policy.py).
    """

    qemu: Command
    qmp: str
    migration: str
    image: str = ""
    node: str = ""
    host: str = ""
    shell: Command = ()
    bin: str = ""
    engine: str = "overlay"
    owner: str = ""
    mode: str = ""
    policy: str = POSTCOPY
    cutover: str = ""
    same: Command = ()
    overwrite: Command = ()
    seed: str = ""

    def ownership(self, option: str) -> list[str]:
        """Return the words that make something B's QEMU's: ``OPTIONowner`` and ``OPTIONmode`` with their
        values.
        """
        words = [f"{option}owner", self.owner] if self.owner else []
        return [*words, f"{option}mode", self.mode] if self.mode else words

    @property
    def is_for_group(self) -> bool:
        """Tell whether it is by its group that B's QEMU may have what is made for it."""
        return ":" in self.owner and bool(self.mode) and bool(int(self.mode, 8) & 0o040)

    def check(self) -> None:
        """Raise UsageError if a value cannot be right."""
        check_place("destination", self.host, self.shell)
        check_monitor("destination.qmp", self.qmp)
        if self.engine not in ("qemu", "overlay"):
            raise UsageError(f"destination.engine: {self.engine!r} is neither qemu nor overlay")
        self._check_policy()
        if self.mode:
            parse_mode(self.mode, "destination.mode")
        if self.owner and not re.fullmatch(r"[^\s:]*(:[^\s:]+)?", self.owner):
            raise UsageError(f"destination.owner: {self.owner!r} is not usable: write USER or USER:GROUP")
        for path in self.same:
            check_path("destination.same", path)
        for path in self.overwrite:
            check_path("destination.overwrite", path)
        if not self.qemu:
            raise UsageError("destination.qemu: give the QEMU command line of host B")
        for option in ("incoming", "qmp", "daemonize", "S"):
            if {f"-{option}", f"--{option}"}.intersection(self.qemu):
                raise UsageError(f"destination.qemu: leave -{option} out, that is taken care of here")
        check_listening("destination.migration", self.migration)
        if self.migration.startswith("unix:"):
            check_path("destination.migration", self.migration.removeprefix("unix:"))

    def _check_policy(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"destination.policy: {self.policy!r} is neither {' nor '.join(POLICIES)}")
        if self.policy == HYBRID and self.engine != "overlay":
            raise UsageError(
                "destination.policy: only nbd-overlay copies before the cut-over: hybrid needs the engine "
                "overlay; with the engine qemu leave it out"
            )
        if self.cutover and self.policy != HYBRID:
            raise UsageError("destination.cutover: this is for the policy hybrid; with postcopy leave it out")
        parse_cutover(self.cutover or AUTO, "destination.cutover")


@dataclass(frozen=True)
class Finish:
    """What happens at the end to the source's image: it is kept where it is, or moved to ``move_aside``.

    Where there are several, that is a directory, in which each keeps its name. ``verify`` says whether what
    was copied is compared on both hosts before; None: with policy hybrid.
    """

    move_aside: str = ""
    verify: bool | None = None

    def check(self) -> None:
        """Raise UsageError if the path is not absolute."""
        if self.move_aside:
            check_path("finish.move_aside", self.move_aside, directory=True)


@dataclass(frozen=True)
class Log:
    """Where the processes that are started write their output: a directory on the host of each."""

    directory: str = ""

    def check(self) -> None:
        """Raise UsageError if the path is not absolute."""
        if self.directory:
            check_path("log.directory", self.directory, directory=True)


@dataclass(frozen=True)
class Plan:
    """One migration. Building it checks everything that can be checked without touching a host.

    Raises UsageError, one line that begins with ``section.key``.
    """

    source: Source
    export: Export
    destination: Destination
    channel: Channel = field(default_factory=Channel)
    limits: Limits = field(default_factory=Limits)
    finish: Finish = field(default_factory=Finish)
    hooks: Hooks = field(default_factory=Hooks)
    log: Log = field(default_factory=Log)
    disk: tuple[PlannedDisk, ...] = ()
    """As the file has them; ``disks`` is what counts."""
    flash: tuple[PlannedFlash, ...] = ()

    def __post_init__(self) -> None:
        for section in fields(self):
            if section.name not in TABLES:
                getattr(self, section.name).check()
        if (self.source.qmp, self.source.host) == (self.destination.qmp, self.destination.host):
            raise UsageError(f"destination.qmp: {self.destination.qmp} is the source's monitor")
        sides = (self.source, self.destination)
        if self.channel.kind == SSH and not any(sessions(way_to(each)) for each in sides):
            raise UsageError(
                "channel.kind: by ssh neither host is reached; say source.host or destination.host, "
                "ssh://..., or leave it out: on one machine nothing crosses a network"
            )
        self._check_disks()

    def _check_disks(self) -> None:
        there = {
            "source.image": self.source.image,
            "source.node": self.source.node,
            "destination.image": self.destination.image,
            "destination.node": self.destination.node,
            "destination.seed": self.destination.seed,
        }
        for name, value in there.items():
            if self.disk and value:
                raise UsageError(f"{name}: with [[disk]] say it there, once for each disk")
        for disk in self.disks:
            disk.check({key: self.called(key) for key in SHORTHAND}, sockets=self.by_overlay)
            if disk.on_device and not self.by_overlay:
                raise UsageError(
                    f"{self.called('target')}: {disk.target} is a block device, which cannot hold a QED "
                    "image, as it grows: use the engine overlay, or name a file"
                )
            if self.by_overlay and self.destination.qmp in disk.beside:
                taken = f"{self.destination.qmp} is where nbd-overlay has a file of {disk.target}"
                raise UsageError(f"destination.qmp: {taken}")
        check_together(self.disks)
        devices = [disk.target for disk in self.disks if disk.on_device]
        other = next((path for path in self.destination.overwrite if path not in devices), None)
        if other is not None:
            where = ", ".join(devices) or "there are none"
            raise UsageError(
                f"destination.overwrite: {other} is no block device to which a disk moves ({where}); "
                "leave it out"
            )
        self._check_flash()
        if self.verifies and not self.by_overlay:
            raise UsageError(
                f"finish.verify: with destination.engine = {self.destination.engine!r} B's QEMU copies, and "
                "nobody knows what of the disk its guest has written; leave one of the two out"
            )
        seeded = next((disk for disk in self.disks if disk.seed), None)
        if seeded and not self.by_overlay:
            raise UsageError(
                f"{self.called('seed')}: with destination.engine = {self.destination.engine!r} B's QEMU "
                "copies, which uses no seed; leave one of the two out"
            )
        for disk in self.disks:
            aside = self.moved_to(disk)
            if aside:
                check_path("finish.move_aside", aside)
            if aside == disk.image:
                raise UsageError("finish.move_aside: this is the image's own path")
        names = [posixpath.basename(disk.image) for disk in self.disks]
        if self.finish.move_aside and len(set(names)) < len(names):
            raise UsageError(
                "finish.move_aside: two images have the same name, and cannot both be moved to "
                f"{self.finish.move_aside}; leave it out, or give one another name"
            )

    def _check_flash(self) -> None:
        beside = [path for disk in self.disks for path in disk.beside]
        for number, flash in enumerate(self.flash):
            flash.check()
            if flash.target in (*beside, *(each.target for each in self.flash[:number])):
                raise UsageError(f"flash.target: {flash.target} is that of something else of this plan")

    @property
    def by_overlay(self) -> bool:
        """Tell whether nbd-overlay has the disks on B until they are complete."""
        return self.destination.engine == "overlay"

    @property
    def through_qemu(self) -> bool:
        """Tell whether A's QEMU has to serve a disk itself until the cut-over, as it alone can read it."""
        return any(disk.format != RAW for disk in self.disks)

    @property
    def hybrid(self) -> bool:
        """Tell whether the disks are copied before the cut-over, as far as that pays."""
        return self.destination.policy == HYBRID

    @property
    def cutover(self) -> Cutover:
        """Return when the guest goes to B, of policy hybrid."""
        return parse_cutover(self.destination.cutover or AUTO, "destination.cutover")

    @property
    def verifies(self) -> bool:
        """Tell whether what was copied is compared on both hosts before A's image is given up.

        With policy hybrid it is, unless the plan says no.
        """
        return self.hybrid if self.finish.verify is None else self.finish.verify

    @property
    def settled(self) -> Plan:
        """Return it with what it leaves to the policy written out, as a journal keeps it."""
        return replace(self, finish=replace(self.finish, verify=self.verifies))

    @property
    def tells_hashes(self) -> bool:
        """Tell whether A's server has to tell hashes of blocks."""
        return self.verifies or any(disk.seed for disk in self.disks)

    @property
    def disks(self) -> tuple[PlannedDisk, ...]:
        """Return the disks that move, at least one."""
        here, there = self.source, self.destination
        return self.disk or (
            PlannedDisk(here.image, there.image, there.node or "disk0", here.node, seed=there.seed),
        )

    def called(self, key: str) -> str:
        """Return what the operator calls a key of a disk, in this plan."""
        return f"disk.{key}" if self.disk else SHORTHAND[key]

    def export_of(self, disk: PlannedDisk) -> NbdUri:
        """Return where A serves a disk: several have export names of their own."""
        address = self.export.address
        if len(self.disks) == 1:
            return address
        return replace(address, export=f"{address.export}-{disk.drive}" if address.export else disk.drive)

    def moved_to(self, disk: PlannedDisk) -> str:
        """Return where A's image of a disk goes in the end; empty where it stays."""
        aside = self.finish.move_aside
        if not aside or len(self.disks) == 1:
            return aside
        return posixpath.join(aside, posixpath.basename(disk.image))

    @property
    def ends_on_b(self) -> tuple[str, str]:
        """Return the sockets on B of disk and RAM, where B itself does not reach them over TCP."""
        return self.export.address.socket or "", self.destination.migration.removeprefix("unix:")

    @property
    def disk_over_tls(self) -> bool:
        """Tell whether the disk goes to B over TLS."""
        return self.channel.kind == TLS and self.export.address.socket is None

    @property
    def ram_over_tls(self) -> bool:
        """Tell whether the RAM does."""
        return self.channel.kind == TLS and self.destination.migration.startswith("tcp:")

    @property
    def all_over_tls(self) -> bool:
        """Tell whether both go in one connection that is encrypted."""
        return self.channel.kind == SINGLE and self.way_to_b.startswith("tcp:")

    @property
    def has_secrets(self) -> bool:
        """Tell whether both hosts are given what nobody else may see: certificates, or a token."""
        return self.disk_over_tls or self.ram_over_tls or self.channel.kind == SINGLE

    @property
    def way_to_b(self) -> str:
        """Return where B listens for what A sends: for its RAM, or for all."""
        return self.channel.address or self.destination.migration

    @property
    def ram_host(self) -> str:
        """Return the name or address of B to which the RAM goes; empty for a Unix socket."""
        if not self.way_to_b.startswith("tcp:"):
            return ""
        return self.way_to_b.removeprefix("tcp:").rpartition(":")[0].strip("[]")


def way_to(there: Source | Destination) -> Command:
    """Return the prefix of commands for a side of a plan: ssh, where it has an address."""
    return ("ssh", *ssh_words(there.host)) if there.host else there.shell


def check_place(section: str, host: str, shell: Command) -> None:
    """Raise UsageError unless this is an address of a host, a prefix, or neither, which is this machine."""
    if host:
        check_host(f"{section}.host", host)
    if host and shell:
        raise UsageError(
            f"{section}.shell: {section}.host says already how commands get there; leave one out"
        )


def check_monitor(where: str, address: str) -> None:
    """Raise UsageError unless this is an absolute path or ``HOST:PORT``."""
    if address.startswith("/"):
        check_path(where, address)
        check_socket_path(address, where)
    elif not is_host_and_port(address):
        raise UsageError(f"{where}: {address!r} is not usable: write a socket's absolute path or HOST:PORT")
