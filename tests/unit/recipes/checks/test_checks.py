"""What is wrong with two hosts is one line with its remedy; what may be wrong is told."""

from __future__ import annotations

import asyncio
import mmap
import time
from pathlib import Path

import pytest

from recipes.checks.clocks import check_clocks
from recipes.checks.local_files import check_local
from recipes.checks.machine_types import check_qemu
from recipes.checks.processor import check_processor
from recipes.checks.space import Need, check_space
from recipes.checks.started import started
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.unit.recipes.checks.hosts import Told, ToldVm

TYPES = """Supported machines are:
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
"""


def vm(major: int, minor: int, kind: str = "pc-i440fx-7.2-machine") -> ToldVm:
    """A's QEMU of this version."""
    return ToldVm(
        {
            "query-version": {"qemu": {"major": major, "minor": minor, "micro": 1}},
            "query-memory-size-summary": {"base-memory": 1},
            "query-cpus-fast": [{}],
            "qom-get": kind,
        }
    )


B = Told("B", answers={"--version": "QEMU emulator version 7.2.22 (Debian)", "-machine help": TYPES})


def test_a_program_is_found_behind_what_stands_before_it() -> None:
    made = started(["sudo", "-u", "vm", "/usr/bin/qemu-system-x86_64", "-m", "1"])
    assert made.program == ("sudo", "-u", "vm", "/usr/bin/qemu-system-x86_64")
    assert made.command is not None
    assert made.command.last("m") == "1"
    wrapper = started(["wrapper", "-m", "1"])
    assert (wrapper.program, wrapper.command) == ((), None)
    assert asyncio.run(check_qemu(vm(7, 2), B, wrapper, 1)) == []
    assert started(["kvm", "-frob"]).command is None


def test_a_machine_type_that_b_does_not_know_is_refused_and_an_older_qemu_is_told() -> None:
    qemu = started(["qemu-system-x86_64"])
    assert asyncio.run(check_qemu(vm(7, 2), B, qemu, 1)) == []
    [warning] = asyncio.run(check_qemu(vm(10, 0), B, qemu, 1))
    assert warning.startswith("B's QEMU 7.2 is older than A's 10.0")
    reason = r"on B \(QEMU 7.2\) does not know the machine type pc-i440fx-10.0 of A's \(QEMU 10.0\); install"
    with pytest.raises(MigrationError, match=reason):
        asyncio.run(check_qemu(vm(10, 0, "pc-i440fx-10.0-machine"), B, qemu, 1))


GIB = 1 << 30


def test_disks_that_may_outgrow_what_b_has_are_told_together() -> None:
    def told(free: int, *sizes: int, engine: str = "overlay") -> list[str]:
        disks = [
            PlannedDisk(f"/{number}", f"/there/{number}", f"d{number}") for number, _ in enumerate(sizes)
        ]
        plan = Plan(
            Source(qmp="/a.qmp"),
            Export(uri="nbd://127.0.0.1/vm"),
            Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m", engine=engine),
            disk=tuple(disks),
        )
        # Of each disk its content, a map or tables, and logs.
        b = Told("B", answers={"stat": f"abc {free // 4096} 4096\n" * 3 * len(sizes)})
        needs = [Need(disk.target, size) for disk, size in zip(disks, sizes, strict=True)]
        return asyncio.run(check_space(plan, needs, b, 1))

    assert told(3 * GIB, 2 * GIB) == []
    [warning] = told(3 * GIB, 2 * GIB, 2 * GIB)
    assert warning.startswith("/there on B: 3 GiB are free, and the disks may grow to 4.006 GiB, with what ")
    for engine, beside in (("overlay", 4 << 20), ("qemu", 2 << 20)):
        assert told(2 * GIB + beside, 2 * GIB, engine=engine) == []
        [warning] = told(2 * GIB + beside // 4, 2 * GIB, engine=engine)
        assert "the disks may grow to 2.00" in warning


def test_clocks_that_differ_are_told() -> None:
    def told(ahead: int) -> list[str]:
        here = int(time.time())
        a, b = (
            # BusyBox knows no parts of a second.
            Told(name, answers={"%N": f"{here + by}.%N\n", "date": f"{here + by}\n"})
            for name, by in (("A", 0), ("B", ahead))
        )
        return asyncio.run(check_clocks(a, b, 1))

    assert told(0) == []
    assert told(2) == []
    assert told(100)[0].startswith("B's clock is 100 s ahead of A's")
    assert told(-100)[0].startswith("B's clock is 100 s behind A's")


def test_a_host_that_tells_no_time_is_told() -> None:
    a, b = (Told(name, answers={"date": "date: what?"}) for name in ("A", "B"))
    with pytest.raises(MigrationError, match=r"^date on B does not tell the time: 'date: what\?'$"):
        asyncio.run(check_clocks(a, b, 1))


def test_a_guest_that_has_its_hosts_processor_is_told_what_b_lacks() -> None:
    a = Told("A", answers={"cpuinfo": "processor: 0\nflags\t\t: fpu avx vmx\n"})
    b = Told("B", answers={"cpuinfo": "flags\t\t: fpu\n"}, paths=frozenset({"/dev/kvm"}))
    host = started(["qemu-system-x86_64", "-enable-kvm", "-cpu", "host,+x"])
    [warning] = asyncio.run(check_processor(a, b, host, 1))
    assert "(-cpu host,+x), and B's lacks avx, vmx:" in warning
    named = started(["qemu-system-x86_64", "-accel", "kvm", "-cpu", "Skylake-Client"])
    assert asyncio.run(check_processor(a, b, named, 1)) == []
    with pytest.raises(MigrationError, match="B has no /dev/kvm"):
        asyncio.run(check_processor(a, a, named, 1))
    for other in (["-accel", "tcg"], ["-machine", "pc,accel=kvm:tcg"], []):
        assert asyncio.run(check_processor(a, a, started(["qemu-system-x86_64", *other]), 1)) == []


def test_what_b_has_not_is_named() -> None:
    words = ["qemu-system-x86_64", "-kernel", "/boot/k", "-serial", "file:/log/x", "-nic", "bridge,br=br7"]
    have = {"/boot/k", "/sys/class/net/br7", "/log", "/run"}

    def check(*missing: str) -> None:
        b = Told("B", paths=frozenset(have - {*missing}))
        asyncio.run(check_local(b, started(words), ["/run/b.qmp"], 1))

    check()
    for missing, reason in (
        ("/boot/k", "B has not the file /boot/k of -kernel; make it there"),
        ("/sys/class/net/br7", "B has not the bridge br7 of -nic"),
        ("/log", "no directory for /log/x on B; make it: mkdir -p /log"),
        ("/run", "no directory for /run/b.qmp on B; make it: mkdir -p /run"),
    ):
        with pytest.raises(MigrationError, match=reason):
            check(missing)


def test_memory_that_another_qemu_has_at_this_moment_is_refused(tmp_path: Path) -> None:
    """As A's on the same machine: the RAM that comes would be written over the guest that still runs."""

    def checked(memory: Path) -> None:
        words = ["qemu", "-object", f"memory-backend-file,id=m,size=4k,mem-path={memory},share=on"]
        asyncio.run(check_local(Host("B"), started(words), (), 60.0))

    file, directory, other = tmp_path / "memory", tmp_path / "huge", tmp_path / "memory2"
    directory.mkdir()
    for each in (file, other, directory / "memory"):
        each.write_bytes(bytes(4096))
    checked(file)
    (tmp_path / "link").symlink_to(file)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 4096):
        for name in (file, tmp_path / "link"):
            with pytest.raises(
                MigrationError, match=rf"the memory file {name}, with share=on, is in use on B"
            ):
                checked(name)
        checked(directory)
        checked(other)
    with other.open("r+b") as opened, mmap.mmap(opened.fileno(), 4096):
        checked(file)
