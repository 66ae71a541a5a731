"""What is secret of a migration, on both hosts: certificates, and the token of the single channel."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta

from nbdserve.common.errors import UsageError
from nbdserve.common.sizes import format_size
from recipes.certificates import placing
from recipes.certificates.authority import LIFE, issue
from recipes.channel.source_user import source_user
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import KEYS, beside
from recipes.migrate.leftovers import remove_certificates
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Certificates
from recipes.plans.channel import SINGLE
from recipes.plans.plan import Plan

TOKEN_BYTES = 32
"""Of chance in a token, which is twice as long, as text."""


def check_life(plan: Plan, size: int, until: float, now: float) -> None:
    """Raise UsageError where a stream of ``size`` bytes is meant to take longer than certificates live.

    ``until`` is when it is to have ended (0: that was not said), ``now`` is now, in seconds since the epoch.
    """
    if not (plan.disk_over_tls or plan.all_over_tls):
        return
    speed, life = plan.limits.speed, LIFE.total_seconds()
    remedy = f"the certificates of a migration live {LIFE.days} days; choose --channel ssh, or less time"
    if until > now + life:
        raise UsageError(f"--finish-by: {remedy}")
    if speed and size / speed > life:
        days = size / speed / timedelta(days=1).total_seconds()
        told = f"at {format_size(speed)} per second the disks take {days:.0f} days"
        raise UsageError(f"limits.speed: {told}, and {remedy}")


async def make(m: Migration) -> None:
    """Give both hosts what they need, unless that is there or not wanted."""
    plan = m.plan
    if not plan.has_secrets or m.state.certificates:
        return
    first, limit = plan.disks[0], plan.limits.command
    on_b = f"{first.stem}{KEYS}" if first.on_device else await beside(m.host_b, first.target, KEYS, limit)
    made = Certificates(await beside(m.host_a, first.image, KEYS, limit), on_b)
    m.record(certificates=made)
    await _issue(m, made)


async def renew(m: Migration) -> None:
    """Give both hosts others in the place of those they have: A has another address than these are for."""
    if m.state.certificates and m.plan.disk_over_tls:
        await _issue(m, m.state.certificates)


async def _issue(m: Migration, made: Certificates) -> None:
    plan = m.plan
    a, b = _files(plan)
    if plan.channel.kind == SINGLE:
        # Both ends are ours, and run as whoever makes this.
        await _place(m, m.host_a, made.a, a)
        await _place(m, m.host_b, made.b, b)
        return
    there = plan.destination
    user = await source_user(m) if plan.ram_over_tls else ""
    await _place(m, m.host_a, made.a, a, user)
    await _place(m, m.host_b, made.b, b, there.owner, for_group=there.is_for_group)


def _files(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """Return what each host is given, by the names of the files."""
    a: dict[str, str] = {}
    b: dict[str, str] = {}
    if plan.disk_over_tls or plan.ram_over_tls or plan.all_over_tls:
        disk_host = plan.export.address.host if plan.disk_over_tls else ""
        issued = issue([disk_host or "a"], [plan.ram_host or "b"])
        a |= placing.files_of(issued.authority, issued.a)
        b |= placing.files_of(issued.authority, issued.b)
    if plan.channel.kind == SINGLE:
        a[placing.TOKEN] = b[placing.TOKEN] = secrets.token_hex(TOKEN_BYTES)
    return a, b


async def _place(
    m: Migration,
    host: Host,
    directory: str,
    files: Mapping[str, str],
    owner: str = "",
    *,
    for_group: bool = False,
) -> None:
    try:
        await placing.place(host, directory, files, owner, m.plan.limits.command, for_group=for_group)
    except MigrationError as error:
        raise MigrationError(f"the keys of this migration cannot be kept on {host.name}: {error}") from error


async def remove_all(m: Migration) -> None:
    """Nothing needs the certificates any more. What cannot be removed is told, and stays in the journal."""
    left = await remove_certificates(m.host_a, m.host_b, m.state, m.plan.limits.command)
    for each in left:
        m.report.note(f"{each}; or later: nbd-migrate abort {m.state.name}")
    if not left and m.state.certificates:
        m.record(certificates=None)
