"""What the demo acts with: the guest, its disk, two machines on this host, and the plan that joins them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.errors import OperatorError
from recipes.demo import initramfs, kernel
from recipes.demo.disk import Original
from recipes.demo.guest import NODE, Guest
from recipes.demo.records import cells_on
from recipes.discovery.addresses import EXPORT_PORT, MIGRATION_PORT
from recipes.discovery.route import free_port
from recipes.hosts.places import KEYS
from recipes.plans.channel import BETWEEN_SOCKETS, TLS, Channel
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Finish, Log, Plan, Source
from recipes.plans.sockets import between_sockets

SPARE = 256 << 20  # bytes of disk space beside the image and its copy
INSPECT_LIMIT = 120.0  # seconds
LOOPBACK = "127.0.0.1"
CHANNELS = ("tls", "plain", "single")
"""Those for which both hosts may be this machine."""


@dataclass(frozen=True)
class Stage:
    """The places of everything.

    directory  for the images, the consoles and the logs
    sockets    another directory, with a path short enough for Unix sockets
    original   what is on the disk before the guest runs
    kernel     the guest's
    engine     what copies the disk: overlay, into a raw file, or qemu, into a QED image
    channel    how disk and RAM go over the loopback's ports; empty: by Unix sockets
    """

    directory: Path
    sockets: Path
    original: Original
    kernel: Path
    engine: str = "overlay"
    channel: str = ""

    @property
    def cells(self) -> int:
        """Places for the guest's records."""
        return cells_on(self.original.size)

    @property
    def image(self) -> Path:
        """Return the disk on A."""
        return self.directory / "a.raw"

    @property
    def moved(self) -> Path:
        """Return where A's disk is moved in the end."""
        return self.directory / "a.raw.moved"

    @property
    def overlay(self) -> Path:
        """Return the disk on B."""
        return self.directory / f"b.{self.layout}"

    @property
    def layout(self) -> str:
        """Return QEMU's name of the format that the disk on B has in the end."""
        return "qed" if self.engine == "qemu" else "raw"

    @property
    def guest_on_a(self) -> Guest:
        """Return the guest in the first machine."""
        return self._guest("a")

    @property
    def guest_on_b(self) -> Guest:
        """Return the guest in the second machine."""
        return self._guest("b")

    def _guest(self, host: str) -> Guest:
        console, control = self.directory / f"{host}.console", self.sockets / f"{host}.control"
        return Guest(self.kernel, self.directory / "initramfs", console, control)

    def monitor(self, host: str) -> Path:
        """Return the QMP socket of host ``a`` or ``b``."""
        return self.sockets / f"{host}.qmp"

    @property
    def export_socket(self) -> Path:
        """Return where A's disk is served."""
        return self.sockets / "nbd"

    @property
    def source_qemu(self) -> tuple[str, ...]:
        """Return the command line of the machine that runs before anything is migrated."""
        return (
            *self.guest_on_a.qemu,
            *("-blockdev", f"driver=raw,node-name={NODE},file.driver=file,file.filename={self.image}"),
            *("-qmp", f"unix:{self.monitor('a')},server=on,wait=off"),
        )

    def plan(self, limits: Limits) -> Plan:
        """Return the migration of A's guest to B."""
        export = f"nbd+unix:///disk?socket={self.export_socket}"
        migration = f"unix:{self.sockets / 'migration'}"
        if self.channel:
            export = f"nbd://{LOOPBACK}:{free_port(LOOPBACK, EXPORT_PORT)}/disk"
            migration = f"tcp:{LOOPBACK}:{free_port(LOOPBACK, MIGRATION_PORT)}"
        plan = Plan(
            Source(qmp=str(self.monitor("a")), image=str(self.image), node=NODE),
            Export(uri=export),
            Destination(
                qemu=self.guest_on_b.qemu,
                image=str(self.overlay),
                qmp=str(self.monitor("b")),
                migration=migration,
                node=NODE,
                engine=self.engine,
            ),
            Channel(self.channel or TLS),
            limits=limits,
            finish=Finish(move_aside=str(self.moved)),
            log=Log(directory=str(self.directory)),
        )
        return between_sockets(plan) if self.channel in BETWEEN_SOCKETS else plan

    def leftovers(self) -> Iterator[str]:
        """Return what must be gone after the last step but is not, a phrase each."""
        if self.image.exists():
            yield f"the source's image is still at {self.image}"
        if _is_listened_on(self.export_socket):
            yield f"the source's server still listens on {self.export_socket}"
        if _is_listened_on(self.monitor("a")):
            yield "the source's QEMU still runs"
        backing = _backing(self.overlay, self.layout)
        if backing:
            yield f"the overlay still has a backing file: {backing}"
        yield from (f"the copy is not a whole disk: there is {path}" for path in _remains_of(self.overlay))
        yield from (f"what was there for the migration alone is still there: {path}" for path in self._made())

    def _made(self) -> Iterator[Path]:
        """Return sockets and keys that are still there."""
        for image in (self.image, self.overlay):
            yield from (path for path in image.parent.glob(f"{image.name}.*") if path.is_socket())
            yield from (path for path in [Path(f"{image}{KEYS}")] if path.exists())


def prepare(
    directory: Path,
    sockets: Path,
    size: int,
    *,
    engine: str = "overlay",
    channel: str = "",
    cache: Path | None = None,
) -> Stage:
    """Fetch the kernel, build the initramfs and make a disk of ``size`` bytes.

    Raises UsageError for a size that does not suit the guest, OperatorError if there is too little space or
    the kernel cannot be fetched.
    """
    cells_on(size)
    free = shutil.disk_usage(directory).free
    if free < 2 * size + SPARE:
        raise OperatorError(
            f"{directory}: {free >> 20} MiB are free, the demo needs {(2 * size + SPARE) >> 20}; "
            "set TMPDIR, or choose --keep or --size"
        )
    fetched = kernel.fetch(cache)
    stage = Stage(directory, sockets, Original(size), fetched.image, engine, channel)
    # Before anything is made: a path may be too long for the sockets beside it.
    stage.plan(Limits())
    initramfs.build(stage.guest_on_a.initramfs, fetched)
    stage.original.write(stage.image)
    return stage


def _is_listened_on(path: Path) -> bool:
    """Tell whether something accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(INSPECT_LIMIT)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def _remains_of(image: Path) -> Iterator[Path]:
    """Return the map and the sockets of nbd-overlay, as far as they are there."""
    yield from (path for suffix in ("map", "nbd", "qmp") if (path := Path(f"{image}.{suffix}")).exists())


def _backing(image: Path, layout: str) -> str:
    """Return the image's backing file as qemu-img sees it, or nothing.

    It does not disturb a QEMU that has it open.
    """
    argv = ["qemu-img", "info", "--force-share", "--output=json", "-f", layout, str(image)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=INSPECT_LIMIT)
    if done.returncode != 0:
        raise OperatorError(f"{image}: qemu-img cannot read it: {done.stderr.strip()}")
    return str(json.loads(done.stdout).get("backing-filename", ""))
