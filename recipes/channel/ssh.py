"""Disk and RAM through the operator's ssh: no port is listened at on either host but that of sshd.

            host A                       where nbd-migrate runs             host B
    nbdserve ---- IMAGE.export <===ssh===  nbd-migrate tunnel  ===ssh=== TARGET.export <---- nbd-overlay
    A's QEMU ---> IMAGE.ram    ====ssh===                      ===ssh==> TARGET.ram    ----- B's QEMU

Each end is a Unix socket of mode 0600. A's server and B's QEMU listen as they would without a tunnel, but
at sockets. The other two are the tunnel's (recipes/connections/tunnel.py): TARGET.export is whose
destination.owner says, as whoever has the disk on B connects there, IMAGE.ram is A's QEMU's.

- The tunnel runs where the orchestrator does, as only there the operator's ssh is known to lead to both
  hosts; on one of the two what is sent goes straight to the other, from a third machine it passes there.
- It is a process of its own, with connections of its own: it lives on when the orchestrator ends after the
  cut-over, as the guest on B depends on it. Before that it ends with the others, and the guard knows it.
- Clients are sessions of ssh, whose standard streams carry their bytes. So an sshd that forbids all
  forwarding is good enough; one that allows few sessions in a connection (MaxSessions) gets more connections.
- Where a connection is lost the tunnel makes another. Where the tunnel itself has ended, the recovery of the
  stream starts it again (steps/recovery.py), or ``resume``. In the meantime the guest waits.
- What there is of it is in the journal before it is made; step 6 and every way back end and remove it
  (migrate/leftovers.py).
"""

from __future__ import annotations

from pathlib import PurePosixPath

from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from recipes.channel.source_user import source_user
from recipes.connections.listen import control_of
from recipes.connections.tunnel import Lead, Orders
from recipes.errors import MigrationError
from recipes.hosts.host import Host, module
from recipes.hosts.places import place_of
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import Role, Tunnel
from recipes.plans.channel import SSH
from recipes.plans.plan import Plan


async def ends_on_a(plan: Plan, host: Host) -> Tunnel:
    """Return the tunnel's sockets on A, beside what belongs to the first image; raises as Host.run() does."""
    image = plan.disks[0].image
    beside = await place_of(host, image, plan.limits.command) / PurePosixPath(image).name
    return Tunnel(f"{beside}.export", f"{beside}.ram")


async def paths(plan: Plan, host: Host) -> list[str]:
    """Return what the tunnel will make on A. Raises MigrationError for what no socket can be called."""
    ends = await ends_on_a(plan, host)
    for path in (ends.disk, control_of(ends.ram)):
        if len(path.encode()) > SOCKET_PATH_LIMIT:
            raise MigrationError(
                f"channel.kind: {path} on A is too long for a socket: {SOCKET_PATH_LIMIT} bytes at most; "
                "give the image a shorter path, or use another channel"
            )
    return [ends.disk, ends.ram]


async def prepare(m: Migration) -> None:
    """Write down what the tunnel will be, before A's server listens at one end of it."""
    if m.plan.channel.kind == SSH and m.state.tunnel is None:
        made = await ends_on_a(m.plan, m.host_a)
        # Of a device this is where nothing may have been kept before.
        directory = str(PurePosixPath(made.disk).parent)
        await m.host_a.run("mkdir", "-p", "--", directory, limit=m.plan.limits.command)
        m.record(tunnel=made)


async def stand(m: Migration) -> None:
    """See that the tunnel stands, if that is the channel. Raises MigrationError."""
    known = m.child(Role.TUNNEL)
    if m.plan.channel.kind != SSH or (known and known.running):
        return
    await prepare(m)
    limits = m.plan.limits
    command = [*module("tunnel"), READY, (await _orders(m)).to_json()]
    tunnel = await m.start(Role.TUNNEL, command, ready=True)
    await m.during(tunnel.ready(limits.start), limits.start, "making the tunnel")
    if not m.arrived:
        m.need("the tunnel", tunnel.wait())


async def _orders(m: Migration) -> Orders:
    assert m.state.tunnel
    there, here = m.plan.destination, m.state.tunnel
    disk, ram = m.plan.ends_on_b
    leads = [Lead("the disk", 1, disk, here.disk, there.owner, there.mode)]
    if not m.arrived:
        leads.append(Lead("the RAM", 0, here.ram, ram, await source_user(m)))
    return Orders((m.host_a, m.host_b), tuple(leads), m.plan.limits.connect)


def server_socket(m: Migration) -> str:
    """Return the socket at which A's server listens for the tunnel; empty where there is none."""
    return m.state.tunnel.disk if m.state.tunnel else ""
