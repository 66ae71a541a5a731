"""A small guest in a real QEMU, and a migration of it: what the tests of the orchestrator act with.

The guest is a boot sector (boot_sector.py) that writes numbered records to its disk and reads all over it. It
boots in a fraction of a second under TCG, and its disk shows exactly what it may have written and what not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
from qemu.qmp.legacy import QEMUMonitorProtocol

from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Finish, Plan, Source
from tests.support import versions
from tests.support.boot_sector import SECTOR, boot_sector, is_record
from tests.support.disks import MIB, random_bytes
from tests.support.processes import Process, check, run, wait_until
from tests.support.servers import UnixAddress

DISK_SIZE = 64 * MIB
"""A power of two, as the guest's random reads are masked with it."""

NBD_MIGRATE = Path(sys.executable).with_name("nbd-migrate")
ROOT = Path(__file__).parents[2]
QEMU = (
    "qemu-system-x86_64",
    "-accel",
    "tcg",
    "-m",
    "16",
    "-nodefaults",
    "-display",
    "none",
    "-machine",
    "pc",
)
DEVICE = ("-device", "virtio-blk-pci,drive=disk0,rerror=stop,werror=stop")


AS_NOBODY_LATER = ("-runas", "nobody") if versions.qemu() < (9, 1) else ("-run-with", "user=nobody")
"""What lets QEMU give up root once everything is open."""


@functools.cache
def original_disk(disk_size: int) -> bytes:
    """The disk of a guest that has not run yet."""
    return boot_sector([disk_size]) + random_bytes(disk_size - SECTOR)


SUPERVISOR = "recipes.processes.supervisor"
"""In the command line of each."""

TUNNEL_MODULE = "recipes.connections.tunnel"
CHANNEL_ON_B = "nbdserve channel --listen"
"""In the command line of what leads through ssh."""

KEPT = "recipes.processes."
"""In that of a supervisor, and of what leads to one."""


class Role(Enum):
    """A process of a migration, by what stands and what does not stand in its command line."""

    A = ("a.qmp,server", (KEPT, "-incoming"))
    B = ("-incoming", (KEPT, CHANNEL_ON_B))
    B_AGAIN = ("b.qmp,server", (KEPT, "-incoming"))
    """Started without a migration."""
    SERVER = ("nbdserve", (KEPT, CHANNEL_ON_B))
    CHANNEL = (CHANNEL_ON_B, (KEPT,))
    """The single channel's end on B; the other one is A's server."""
    FENCE = ("recipes.fencing.fence", (KEPT,))
    GUARD = ("recipes.migrate.guard", ())
    CHIEF = ('"tell"', ())
    DEPUTY = ('"chief"', ())
    TUNNEL = (TUNNEL_MODULE, (KEPT,))
    OVERLAY = ("nbd-overlay serve", (KEPT,))
    ONE_OVERLAY = ("/b1.raw -k ", (KEPT,))
    """Of several that of the second disk; see many_disks.py."""
    SUPERVISOR_OF_B = (SUPERVISOR, ("nbdserve", "recipes.fencing.fence", "nbd-overlay", TUNNEL_MODULE))
    SUPERVISOR_OF_OVERLAY = (SUPERVISOR, ("nbdserve", "recipes.fencing.fence", "-incoming", TUNNEL_MODULE))
    SUPERVISOR_OF_SERVER = (
        SUPERVISOR,
        ("-incoming", "recipes.fencing.fence", "nbd-overlay", TUNNEL_MODULE, CHANNEL_ON_B),
    )
    CONNECTION = ("[mux]", ())
    """Of ssh, shared by several; of a stage whose XDG_RUNTIME_DIR is in its directory."""
    ORCHESTRATOR = ("plan.toml", ())

    def find(self, directory: Path) -> list[psutil.Process]:
        """The processes in this role whose command line names the directory."""
        word, others = self.value
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                line = " ".join(process.cmdline())
                if str(directory) in line and word in line and not any(other in line for other in others):
                    found.append(process)
        return found


KEEPS = {
    Role.SUPERVISOR_OF_B: {Role.B, Role.B_AGAIN},
    Role.SUPERVISOR_OF_OVERLAY: {Role.OVERLAY},
    Role.SUPERVISOR_OF_SERVER: {Role.SERVER},
}
"""What supervisors are there for."""


def lives(pid: int) -> bool:
    """Whether a process is neither gone nor a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Monitor:
    """A QEMU's monitor, for a moment. There may be one client at a time, so tests do not stay connected."""

    def __init__(self, address: Path) -> None:
        self._qmp = QEMUMonitorProtocol(str(address))
        self._qmp.connect()
        self._qmp.settimeout(60.0)

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute a QMP command; ``_`` in a keyword stands for ``-``."""
        return self._qmp.cmd(command, **{key.replace("_", "-"): value for key, value in arguments.items()})

    @property
    def state(self) -> str:
        """What query-status says."""
        return str(self.execute("query-status")["status"])


@contextlib.contextmanager
def monitor(address: Path) -> Iterator[Monitor]:
    """Connect to a monitor."""
    connection = Monitor(address)
    try:
        yield connection
    finally:
        # A QEMU that has been told to quit has hung up already.
        with contextlib.suppress(EOFError, OSError):
            connection._qmp.close()


class Scene:
    """Hosts A and B in one directory, a guest that runs on A, and the plan to move it to B."""

    def __init__(self, directory: Path, engine: str = "overlay", disk_size: int = DISK_SIZE) -> None:
        self.directory = directory
        self.image = directory / "a.raw"
        self.moved = directory / "a.moved"
        self.away = directory / "a.raw.moved"
        """Where A's image is from the cut-over until it is moved aside."""
        self.overlay = directory / ("b.qed" if engine == "qemu" else "b.raw")
        self.monitor_a = directory / "a.qmp"
        self.monitor_b = directory / "b.qmp"
        self.export = directory / "nbd"
        self.original = original_disk(disk_size)
        self.image.write_bytes(self.original)
        limits = Limits(connect=60.0, command=60.0, start=120.0, stop=30.0, reconnect_delay=2)
        self.plan = Plan(
            Source(qmp=str(self.monitor_a), image=str(self.image), node="disk0"),
            Export(uri=UnixAddress(self.export).uri("vm")),
            Destination(
                qemu=(*QEMU, *DEVICE, "-serial", f"file:{directory / 'b.serial'}"),
                image=str(self.overlay),
                qmp=str(self.monitor_b),
                migration=f"unix:{directory / 'migration'}",
                engine=engine,
            ),
            limits=limits,
            finish=Finish(move_aside=str(self.moved)),
        )

    def change(self, section: str, **values: object) -> None:
        """Change keys of one section of the plan."""
        changed = dataclasses.replace(getattr(self.plan, section), **values)
        self.plan = dataclasses.replace(self.plan, **{section: changed})

    def source_qemu(self) -> list[str]:
        """A's command line."""
        driver = "host_device" if self.image.is_block_device() else "file"
        return [
            *QEMU,
            *DEVICE,
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *("-blockdev", f"driver=raw,node-name=disk0,file.driver={driver},file.filename={self.image}"),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]

    def dots(self, host: str) -> int:
        """How many records the guest has written on host ``a`` or ``b``, by what it prints there."""
        console = self.directory / f"{host}.serial"
        return console.read_bytes().count(b".") if console.exists() else 0

    def wait_until_streamed(self) -> None:
        """The block job on B has come to its end."""
        with monitor(self.monitor_b) as b:
            wait_until(lambda: b.execute("query-block-jobs") == [], "the stream ends", 30.0, 0.1)

    def wait_until_guest_works(self, host: str) -> None:
        """The guest writes and reads on host ``a`` or ``b``."""
        before = self.dots(host)
        wait_until(lambda: self.dots(host) > before + 2, f"the guest works on {host}", 15.0)

    def plan_file(self) -> Path:
        """The plan as a file."""
        path = self.directory / "plan.toml"
        path.write_text(as_toml(self.plan))
        return path

    def run_doomed(self, moment: str, *victims: Role, number: signal.Signals = signal.SIGKILL) -> Process:
        """The same, with a signal to ``victims`` at this moment; see tests/support/doomed.py."""
        argv = [sys.executable, "-m", "tests.support.doomed", str(self.plan_file())]
        names = "+".join(victim.name for victim in victims)
        return Process([*argv, moment, names, number.name], self.directory / "run.log", cwd=ROOT)

    def run(self, *options: str, cwd: Path | None = None) -> Process:
        """``nbd-migrate run`` with the plan, from another working directory if one is given."""
        argv = [str(NBD_MIGRATE), "run", str(self.plan_file()), *options]
        return Process(argv, self.directory / "run.log", cwd=cwd)

    def started(self) -> set[Role]:
        """What a migration has started and is still there.

        A supervisor stays with its process until the migration is over: that alone is none too many.
        """
        found = {role for role in Role if role is not Role.A and role.find(self.directory)}
        return {role for role in found if role not in KEEPS or not found & KEEPS[role]}

    def wait_until_only(self, roles: set[Role]) -> None:
        """Wait until these alone are there of what a migration has started.

        An orchestrator that was killed is gone before its guard, and a process before its supervisor.
        """
        wait_until(lambda: self.started() == roles, f"{roles} alone are left", 30.0, 0.1)

    def capabilities_of_a(self) -> list[str]:
        """The migration capabilities that are on at A."""
        with monitor(self.monitor_a) as a:
            return [each["capability"] for each in a.execute("query-migrate-capabilities") if each["state"]]

    def quit_b(self) -> None:
        """End B's QEMU in good order, so that its disk can be looked at."""
        with monitor(self.monitor_b) as b:
            b.execute("quit")
        wait_until(lambda: not Role.B.find(self.directory), "B's QEMU ends")

    def wrong_sectors(self, *, interrupted: bool = False) -> list[int]:
        """Sectors of B's disk that hold neither what was on A's nor what the guest may have written there.

        A QEMU that was killed, or that failed to copy a cluster, may have left clusters in the overlay that
        nothing points to, but no damage.
        """
        layout, copy = self.overlay.suffix.removeprefix("."), self.directory / "copy.raw"
        if layout == "qed":
            leaks = 3
            checked = run("qemu-img", "check", "-f", "qed", self.overlay)
            assert checked.returncode in ((0, leaks) if interrupted else (0,)), checked.stdout
        check("qemu-img", "convert", "-f", layout, "-O", "raw", self.overlay, copy)
        moved, original = copy.read_bytes(), self.original
        copy.unlink()
        assert len(moved) == len(original)
        return [
            at // SECTOR
            for at in range(0, len(moved), SECTOR)
            if moved[at : at + SECTOR] != original[at : at + SECTOR]
            and not is_record(at // SECTOR, moved[at : at + SECTOR])
        ]


class TwoMonitors(Scene):
    """A guest whose QEMU has a second monitor on A: a monitor serves one client at a time."""

    @property
    def second(self) -> Path:
        """The second monitor's socket."""
        return self.directory / "second.qmp"

    def source_qemu(self) -> list[str]:
        """A's command line."""
        return [*super().source_qemu(), "-qmp", f"unix:{self.second},server=on,wait=off"]


@contextlib.contextmanager
def scene(directory: Path, engine: str = "overlay") -> Iterator[Scene]:
    """A guest that runs on A, on a disk of DISK_SIZE bytes, with everything on this host."""
    made = Scene(directory, engine)
    with running(made):
        yield made


@contextlib.contextmanager
def running(stage: Scene, *shell: str) -> Iterator[None]:
    """The guest runs on A; it is killed at the end, and so is all that the migration has started."""
    with Process([*shell, *stage.source_qemu()], stage.directory / "a.log"), stopped_with(stage):
        stage.wait_until_guest_works("a")
        yield


@contextlib.contextmanager
def stopped_with(stage: Scene) -> Iterator[None]:
    """All that a migration has started is killed in the end; a migrated guest lives on by design."""
    try:
        yield
    finally:
        for role in Role:
            for process in role.find(stage.directory):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def as_toml(plan: Plan) -> str:
    """The plan's file; JSON's strings, numbers and lists are TOML's."""
    lines = []
    for section, values in dataclasses.asdict(plan).items():
        for table in values if isinstance(values, tuple) else [values]:
            lines.append(f"[[{section}]]" if isinstance(values, tuple) else f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"
