"""Disk and RAM in one connection, which A makes to B: no other has to be possible between the two.

            host A                                               host B
    nbdserve channel --connect ======= one connection ======> nbdserve channel --listen
    A's QEMU --> IMAGE.ram                                    TARGET.ram ----> B's QEMU
    A's disks                                                 TARGET.export <---- nbd-overlay

A's end is A's server, with the same exports: it takes its requests from the channel in the place of a port.
B's end offers them at TARGET.export, which is whose destination.owner says, and leads the RAM to B's QEMU,
which listens at TARGET.ram. IMAGE.ram is A's QEMU's.

- The connection goes over TLS, where it is one of TCP: both ends show a certificate of this migration, and
  verify the other's. Both prove, too, that they know its token, which lies beside the keys (keys.py).
- B's end is started first, and A's connects to it, again and again: where the connection is lost both wait
  for the next one, and so does the guest, which is on B by then. Before that the loss of the RAM's stream
  ends the migration, as if QEMU had sent it by itself.
- Where an end has died the recovery of the stream starts it again (steps/recovery.py), or ``resume``.
- When B has everything that is said to its end, and with that both end by themselves.
- What there is of it is in the journal before it is made; step 6 and every way back end and remove it
  (migrate/leftovers.py).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import PurePosixPath

from nbdserve.common.errors import ConnectError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from recipes.certificates.placing import TOKEN
from recipes.channel.source_server import monitor_path
from recipes.channel.source_user import source_user
from recipes.connections.monitors import monitor_of
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import beside
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import NAMES, Role, Tunnel
from recipes.plans.channel import SINGLE
from recipes.plans.plan import Plan
from recipes.plans.sockets import monitor_on_b
from recipes.qemu.vm import VmGoneError, connect

RAM = ".ram"
"""How the name of the socket ends to which A's QEMU sends its guest."""

PARTING = 15.0
"""Seconds in which A's end, which may have to connect again first, hears that it has nothing more to do."""


async def paths_on_a(plan: Plan, host: Host) -> list[str]:
    """Return the socket that A's end makes. Raises MigrationError for what no socket can be called."""
    ram = await beside(host, plan.disks[0].image, RAM, plan.limits.command)
    if len(ram.encode()) > SOCKET_PATH_LIMIT:
        raise MigrationError(
            f"channel.kind: {ram} on A is too long for a socket: {SOCKET_PATH_LIMIT} bytes at most; "
            "give the image a shorter path, or use another channel"
        )
    return [ram]


async def prepare(m: Migration) -> None:
    """Write down what the two ends will make, and see that B's is there before A's connects to it.

    Raises MigrationError.
    """
    if m.plan.channel.kind != SINGLE:
        return
    if m.state.tunnel is None:
        [ram] = await paths_on_a(m.plan, m.host_a)
        # Of a device this is where nothing may have been kept before.
        directory = str(PurePosixPath(ram).parent)
        await m.host_a.run("mkdir", "-p", "--", directory, limit=m.plan.limits.command)
        m.record(tunnel=Tunnel("", ram, await monitor_path(m)))
    await stand(m)


async def stand(m: Migration) -> None:
    """See that B's end is there, if this is the channel. Raises MigrationError."""
    known = m.child(Role.CHANNEL)
    if m.plan.channel.kind != SINGLE or (known and known.running):
        return
    assert m.state.certificates
    limit, disk, ram = m.plan.limits.start, *m.plan.ends_on_b
    command = [
        *(m.host_b.tool("nbdserve"), "channel", "--listen", m.plan.way_to_b.removeprefix("tcp:")),
        *("--socket", disk, *m.plan.destination.ownership("--socket-"), "--incoming", f"unix:{ram}"),
        *_proving(m.plan, m.state.certificates.b),
        *("--qmp", f"unix:{monitor_on_b(m.plan)}", "--pid-file", READY),
    ]
    end = await m.start(Role.CHANNEL, command, ready=True)
    await m.during(end.ready(limit), limit, f"starting {NAMES[Role.CHANNEL]}")
    if not m.arrived:
        m.need(NAMES[Role.CHANNEL], end.wait())


async def server_words(m: Migration) -> list[str]:
    """Return the words that make A's server an end of the channel, in the place of where it listens."""
    assert m.state.tunnel
    assert m.state.certificates
    user = await source_user(m)
    return [
        *("channel", "--connect", m.plan.way_to_b.removeprefix("tcp:")),
        *("--ram", f"unix:{m.state.tunnel.ram}", *(["--socket-owner", user] if user else [])),
        *_proving(m.plan, m.state.certificates.a),
    ]


def _proving(plan: Plan, directory: str) -> list[str]:
    """Return the words by which an end proves who it is, with what is in this directory."""
    words = ["--token-file", f"{directory}/{TOKEN}"]
    return [*words, "--tls-certificates", directory] if plan.all_over_tls else words


async def part(m: Migration) -> None:
    """B has every block: both ends are told so, and end. What fails is only told, as all is there."""
    end = m.child(Role.CHANNEL)
    if m.plan.channel.kind != SINGLE or end is None or not end.running or m.server is None:
        # A host that is gone for good is not waited for.
        return
    limits = m.plan.limits
    try:
        where = monitor_of(m.host_b, monitor_on_b(m.plan))
        monitor = await connect(end.name, where, limit=limits.connect, command_limit=limits.command)
        try:
            # It may have ended with its answer still under way.
            with suppress(VmGoneError):
                await monitor.execute("channel-done")
        finally:
            await monitor.disconnect()
        async with asyncio.timeout(PARTING):
            await end.wait()
            await m.server.wait()
    except (MigrationError, ConnectError, TimeoutError) as error:
        m.report.note(f"the two ends of the channel have not parted by themselves, and are ended: {error}")
