"""A small guest in a real QEMU, and a migration of it: what the tests of the orchestrator act with.

The guest is a boot sector that writes numbered records to its disk and reads all over it, for ever. It boots
in a fraction of a second under TCG, and its disk shows exactly what it may have written and what not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import struct
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
from qemu.qmp.legacy import QEMUMonitorProtocol

from recipes.plans.plan import Destination, Export, Finish, Limits, Plan, Source
from tests.support import versions
from tests.support.disks import MIB, random_bytes
from tests.support.processes import Process, check, run, wait_until
from tests.support.servers import UnixAddress

SECTOR = 512
DISK_SIZE = 64 * MIB
"""A power of two, as the guest's random reads are masked with it."""

RECORDS = range(2048, 3072)
"""The sectors that the guest writes: record number n, 128 times, goes to sector 2048 + n % 1024."""

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


def boot_sector(disk_size: int) -> bytes:
    """The guest: 16-bit code for address 0x7c00, which finds the number of its BIOS drive in DL.

    Once a key has been pressed it switches itself off. The counter is at 0x5e00, the disk address packet of
    INT 13h's extensions at 0x5e10, the buffer at 0x8000, the stack below 0x7000: on the page of the code each
    write would have it translated again.
    """
    mask = struct.pack("<I", disk_size // SECTOR - 1).hex()
    code = bytes.fromhex(
        # xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7000; cld; sti
        "31c0 8ed8 8ec0 8ed0 bc0070 fc fb"
        # again: inc dword [0x5e00]
        "66ff06005e"
        # mov eax,[0x5e00]; mov edi,0x8000; mov cx,128; rep stosd
        "66a1005e 66bf00800000 b98000 66f3ab"
        # mov eax,[0x5e00]; and eax,1023; add eax,2048; mov bh,0x43 (write); call access
        "66a1005e 6625ff030000 660500080000 b743 e82800"
        # mov eax,[0x5e00]; imul eax,eax,0x9e3779b1; and eax,MASK; mov bh,0x42 (read); call access
        f"66a1005e 6669c0b179379e 6625{mask} b742 e81200"
        # push dx; mov dx,0x3f8; mov al,'.'; out dx,al; pop dx
        "52 baf803 b02e ee 5a"
        # test byte [0x5e00],3; jnz again; hlt (until the next tick of 55 ms: others use the processor too);
        # jmp look
        "f606005e03 75b1 f4 eb35"
        # access: mov dword [0x5e10],0x10010; mov dword [0x5e14],0x8000; mov [0x5e18],eax; mov dword
        # [0x5e1c],0
        "66c706105e10000100 66c706145e00800000 66a3185e 66c7061c5e00000000"
        # mov si,0x5e10; mov ah,bh; mov al,0; push dx; int 0x13; pop dx; jc failed; ret
        "be105e 88fc b000 52 cd13 5a 7201 c3"
        # failed: mov dx,0x3f8; mov al,'!'; out dx,al; cli; hlt
        "baf803 b021 ee fa f4"
        # look: mov ah,1; int 0x16; jnz off; jmp again
        "b401 cd16 7503 e970ff"
        # off: mov dx,0x604; mov ax,0x2000; out dx,ax (ACPI's sleep state S5); cli; hlt
        "ba0406 b80020 ef fa f4"
    )
    return code.ljust(510, b"\0") + b"\x55\xaa"


@functools.cache
def original_disk(disk_size: int) -> bytes:
    """The disk of a guest that has not run yet."""
    return boot_sector(disk_size) + random_bytes(disk_size - SECTOR)


SUPERVISOR = "recipes.processes.supervisor"
"""In the command line of each."""

KEPT = "recipes.processes."
"""In that of a supervisor, and of what leads to one."""


class Role(Enum):
    """A process of a migration, by what stands and what does not stand in its command line."""

    A = ("a.qmp,server", (KEPT, "-incoming"))
    B = ("-incoming", (KEPT,))
    B_AGAIN = ("b.qmp,server", (KEPT, "-incoming"))
    """Started without a migration."""
    SERVER = ("nbdserve", (KEPT,))
    FENCE = ("recipes.qemu.fence", (KEPT,))
    GUARD = ("recipes.migrate.guard", ())
    CHIEF = ('"tell"', ())
    DEPUTY = ('"chief"', ())
    OVERLAY = ("nbd-overlay serve", (KEPT,))
    SUPERVISOR_OF_B = (SUPERVISOR, ("nbdserve", "recipes.qemu.fence", "nbd-overlay"))
    SUPERVISOR_OF_OVERLAY = (SUPERVISOR, ("nbdserve", "recipes.qemu.fence", "-incoming"))
    SUPERVISOR_OF_SERVER = (
        SUPERVISOR,
        ("-incoming", "recipes.qemu.fence", "nbd-overlay"),
    )
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
        wait_until(lambda: self.started() == roles, f"{roles} alone are left", 30.0)

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


def is_record(sector: int, content: bytes) -> bool:
    """Whether the guest may have written this to this sector."""
    number = struct.unpack_from("<I", content)[0]
    return (
        sector in RECORDS and sector == RECORDS.start + number % len(RECORDS) and content == content[:4] * 128
    )


@contextlib.contextmanager
def scene(directory: Path, engine: str = "overlay") -> Iterator[Scene]:
    """A guest that runs on A, on a disk of DISK_SIZE bytes, with everything on this host."""
    made = Scene(directory, engine)
    with running(made):
        yield made


@contextlib.contextmanager
def running(stage: Scene, *shell: str) -> Iterator[None]:
    """The guest runs on A; it is killed at the end, and so is all that the migration has started."""
    with Process([*shell, *stage.source_qemu()], stage.directory / "a.log"):
        try:
            stage.wait_until_guest_works("a")
            yield
        finally:
            # A migrated guest lives on by design.
            for role in Role:
                for process in role.find(stage.directory):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def as_toml(plan: Plan) -> str:
    """The plan's file; JSON's strings, numbers and lists are TOML's."""
    lines = []
    for section, values in dataclasses.asdict(plan).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
