"""Disk and RAM over TLS: what each end is told to use the certificates that both hosts have (keys.py).

Each end verifies the other: the disk's server on A and the RAM's on B take nobody without a certificate of
this migration, and their clients nobody else for the host that the plan names.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import replace

from nbdserve.common.uri import NbdUri, Tls, TlsType
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
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
