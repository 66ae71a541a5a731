"""Disk and RAM over TLS: certificates for both hosts, and what each end is told to use them.

Each end verifies the other: the disk's server on A and the RAM's on B take nobody without a certificate of
this migration, and their clients nobody else for the host that the plan names.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import replace
from datetime import timedelta

from nbdserve.common.errors import UsageError
from nbdserve.common.sizes import format_size
from nbdserve.common.uri import NbdUri, Tls, TlsType
from recipes.certificates.authority import LIFE, issue
from recipes.certificates.placing import place
from recipes.channel.source_user import source_user
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import KEYS, beside
from recipes.migrate.leftovers import remove_certificates
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Certificates
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.qemu.credentials import (
    ID,
    Parameters,
    drop_credentials,
    use_credentials,
    use_object,
    wanted_back,
)
from recipes.qemu.vm import CommandError

DISK_ID = "nbd-migrate-disk"
"""Of the object of a QEMU that reads the disk itself."""


def check_life(plan: Plan, size: int, until: float, now: float) -> None:
    """Raise UsageError where a stream of ``size`` bytes is meant to take longer than certificates live.

    ``until`` is when it is to have ended (0: that was not said), ``now`` is now, in seconds since the epoch.
    """
    speed, life = plan.limits.speed, LIFE.total_seconds()
    remedy = f"the certificates of a migration live {LIFE.days} days; choose --channel ssh, or less time"
    if plan.disk_over_tls and until > now + life:
        raise UsageError(f"--finish-by: {remedy}")
    if plan.disk_over_tls and speed and size / speed > life:
        days = size / speed / timedelta(days=1).total_seconds()
        told = f"at {format_size(speed)} per second the disks take {days:.0f} days"
        raise UsageError(f"limits.speed: {told}, and {remedy}")


async def make_certificates(m: Migration) -> None:
    """Give both hosts what they need, unless that is there or not wanted."""
    plan = m.plan
    if not (plan.disk_over_tls or plan.ram_over_tls) or m.state.certificates:
        return
    first, limit = plan.disks[0], plan.limits.command
    on_b = f"{first.stem}{KEYS}" if first.on_device else await beside(m.host_b, first.target, KEYS, limit)
    made = Certificates(await beside(m.host_a, first.image, KEYS, limit), on_b)
    m.record(certificates=made)
    disk_host = plan.export.address.host if plan.disk_over_tls else ""
    issued = issue([disk_host or "a"], [plan.ram_host or "b"])
    user = await source_user(m) if plan.ram_over_tls else ""
    await _place(m.host_a, place(m.host_a, made.a, issued.authority, issued.a, user, limit))
    there = plan.destination
    placing = place(
        m.host_b, made.b, issued.authority, issued.b, there.owner, limit, for_group=there.is_for_group
    )
    await _place(m.host_b, placing)


async def _place(host: Host, placing: Awaitable[None]) -> None:
    try:
        await placing
    except MigrationError as error:
        raise MigrationError(
            f"the certificates of this migration cannot be kept on {host.name}: {error}"
        ) from error


def disk_uri(m: Migration, disk: PlannedDisk) -> NbdUri:
    """Return the export of a disk as B connects to it."""
    address = m.plan.export_of(disk)
    if not m.plan.disk_over_tls or m.state.certificates is None:
        return address
    return replace(address, tls=Tls(TlsType.CERTIFICATES, certificates=m.state.certificates.b))


def server_options(m: Migration) -> list[str]:
    """Return the words for A's server."""
    if not m.plan.disk_over_tls or m.state.certificates is None:
        return []
    return ["--tls-certificates", m.state.certificates.a, "--tls-require", "--tls-verify-peer"]


def qemu_options(m: Migration, *, reads_disk: bool) -> list[str]:
    """Return the words for B's QEMU, which may read the disk itself."""
    if not (reads_disk and m.plan.disk_over_tls) or m.state.certificates is None:
        return []
    return ["-object", json.dumps({"id": DISK_ID, **use_object("client", m.state.certificates.b)})]


async def expect_ram(m: Migration) -> None:
    """Have B's QEMU, before it listens, take the RAM over TLS only."""
    if m.plan.ram_over_tls and m.state.certificates:
        await _told(use_credentials(m.monitor_b, "server", m.state.certificates.b), "B")


async def send_ram(m: Migration) -> None:
    """Have A's QEMU send the RAM over TLS, to B only; what was set there is written down before."""
    if m.plan.ram_over_tls and m.state.certificates:
        m.record(parameters=await wanted_back(m.a))
        hostname = m.plan.ram_host.partition("%")[0]
        await _told(use_credentials(m.a, "client", m.state.certificates.a, hostname), "A")


async def _told(telling: Awaitable[None], host: str) -> None:
    try:
        await telling
    except CommandError as error:
        raise MigrationError(
            f"{host}'s QEMU cannot use the certificates of this migration: {error.reason}"
        ) from error


async def forget_ram(m: Migration) -> None:
    """The RAM is there: B's QEMU needs its credentials no more. What fails here is only told."""
    if not (m.plan.ram_over_tls and m.state.certificates):
        return
    try:
        await drop_credentials(m.monitor_b, Parameters())
    except MigrationError as error:
        m.report.note(f"B's QEMU still has the object {ID} of its migration: {error}")


async def remove_all(m: Migration) -> None:
    """Nothing needs the certificates any more. What cannot be removed is told, and stays in the journal."""
    left = await remove_certificates(m.host_a, m.host_b, m.state, m.plan.limits.command)
    for each in left:
        m.report.note(f"{each}; or later: nbd-migrate abort {m.state.name}")
    if not left and m.state.certificates:
        m.record(certificates=None)
