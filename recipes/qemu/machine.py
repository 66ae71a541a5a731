"""Whether B's machine is the one that A's guest runs in, as far as QEMU tells before the guest is sent.

What is different otherwise shows only when all of the RAM has been sent, and all that QEMU says then is that
the load has failed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.sizes import format_size
from recipes.errors import MigrationError
from recipes.qemu.vm import CommandError, Vm


@dataclass(frozen=True)
class Machine:
    """A QEMU's machine: its type, its processors, and its RAM in bytes, built in and plugged in."""

    type: str
    processors: int
    ram: int
    plugged: int


async def machine_of(vm: Vm) -> Machine:
    """Ask a QEMU, in which the guest runs or is awaited."""
    memory = await vm.execute("query-memory-size-summary")
    processors = await vm.execute("query-cpus-fast")
    try:
        kind = str(await vm.execute("qom-get", path="/machine", property="type"))
    except CommandError:
        kind = ""
    ram, plugged = int(memory["base-memory"]), int(memory.get("plugged-memory", 0))
    return Machine(kind.removesuffix("-machine"), len(processors), ram, plugged)


async def check_machine(a: Vm, b: Vm) -> None:
    """Raise MigrationError, which says what to write, unless B's machine is like A's."""
    here, there = await machine_of(a), await machine_of(b)
    faults = []
    if here.ram != there.ram:
        remedy = f"-m size={here.ram // (1 << 20)}M" if here.ram % (1 << 20) == 0 else f"-m size={here.ram}B"
        faults.append(f"{format_size(there.ram)} of RAM, A's {format_size(here.ram)}: write {remedy}")
    if here.plugged != there.plugged:
        plugged = [format_size(size) if size else "nothing" for size in (there.plugged, here.plugged)]
        faults.append(f"{plugged[0]} in memory devices, A's {plugged[1]}: give it those of A")
    if here.processors != there.processors:
        faults.append(f"{there.processors} processors, A's {here.processors}: write -smp {here.processors}")
    if here.type != there.type:
        faults.append(f"the machine type {there.type}, A's {here.type}: write -machine {here.type}")
    if faults:
        raise MigrationError(f"destination.qemu: B's machine has {'; and '.join(faults)}")
