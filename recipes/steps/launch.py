"""Step 3: the QEMU on B that waits for the guest."""

from __future__ import annotations

from recipes.channel import tls
from recipes.engines.choice import engine_for
from recipes.engines.interface import blockdev_options, reached
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.plan import Plan
from recipes.plans.reaching import monitor_b
from recipes.qemu.machine import check_machine
from recipes.qemu.vm import CommandError, Vm
from recipes.steps.rights import check_rights, explain_start


async def launch(m: Migration) -> str:
    """Step 3: start the QEMU on B that waits for the guest."""
    destination, limits = m.plan.destination, m.plan.limits
    m.enter(Phase.LAUNCH)
    engine = engine_for(m)
    for disk in m.disks:
        await engine.prepare(m, disk)
    nodes = [node for disk in m.disks for node in engine.nodes(m.plan, disk)]
    argv = [
        *destination.qemu,
        *tls.qemu_options(m, reads_disk=engine.read_by_qemu),
        *blockdev_options(nodes),
        "-incoming",
        "defer",
        "-qmp",
        monitor_option(destination.qmp),
    ]
    qemu = await m.start(Role.QEMU, argv)
    m.need("B's QEMU", qemu.wait())
    try:
        where = monitor_b(m.plan, m.host_b)
        m.b = await m.during(reached("B's QEMU", where, m.plan), limits.start, "starting B's QEMU")
    except MigrationError as error:
        raise explain_start(m, error) from error
    await m.during(check_devices(m.plan, m.b), limits.command, "looking at B's disks")
    await m.during(check_machine(m.a, m.b), limits.command, "comparing B's machine with A's")
    await m.during(check_rights(m), limits.command, "looking at what B's QEMU may do")
    await m.during(tls.expect_ram(m), limits.command, "telling B's QEMU about TLS")
    listen = m.b.execute("migrate-incoming", uri=destination.migration)
    await m.during(listen, limits.command, "listening for the RAM")
    return f"process {qemu.pid} waits at {destination.migration}"


def monitor_option(address: str) -> str:
    """Return the value of QEMU's -qmp for a monitor at this address."""
    kind = "unix" if address.startswith("/") else "tcp"
    return f"{kind}:{address.replace(',', ',,')},server=on,wait=off"


async def check_devices(plan: Plan, b: Vm) -> None:
    """Insist that B's guest has each disk, and waits when the export is away instead of seeing I/O errors."""
    for disk in plan.disks:
        await check_device(disk.drive, b)


async def check_device(node: str, b: Vm) -> None:
    """Insist on that of one disk."""
    devices = [each for each in await b.execute("query-block") if "qdev" in each]
    using = [each["qdev"] for each in devices if each.get("inserted", {}).get("node-name") == node]
    if not using:
        raise MigrationError(
            f"destination.qemu: no -device has drive={node}, so the guest would not have this disk"
        )
    for name in ("rerror", "werror"):
        try:
            action = await b.execute("qom-get", path=using[0], property=name)
        except CommandError as error:
            reason = f"the -device of {node} has no {name}: use virtio-blk, scsi-hd or ide-hd"
            raise MigrationError(f"destination.qemu: {reason}") from error
        if action != "stop":
            reason = (
                f"the -device of {node} has {name}={action}, and an export that is away would be an error"
            )
            raise MigrationError(f"destination.qemu: {reason} in the guest; write rerror=stop,werror=stop")
