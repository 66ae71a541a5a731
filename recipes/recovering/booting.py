"""A guest is started on A as it was started there before its migration.

How that was is looked up before the migration begins, and kept in its journal. Of a QEMU that libvirt has
started, or somebody to whom it is connected by open descriptors, nothing is kept: whoever has started it does
so again.
"""

from __future__ import annotations

from nbdserve.common.errors import OperatorError
from recipes.checks.started import started
from recipes.discovery.command_line.options import CommandLine
from recipes.discovery.derive import made_paths
from recipes.discovery.discover import understood
from recipes.discovery.managed import is_libvirts
from recipes.discovery.process import Process
from recipes.engines.interface import reached
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import listed, pasted
from recipes.migrate.runtime import Migration
from recipes.plans.plan import Plan
from recipes.plans.reaching import monitor_a
from recipes.recovering.lost_places import make_lost

_ONLY_ONCE = ("incoming", "loadvm", "daemonize", "S")
"""Options that are about one start: where its RAM came from, or who let it run."""

_BECOMES_ANOTHER = ("runas", "run-with")
"""With them QEMU itself becomes another user."""


async def how_started(plan: Plan, host: Host) -> tuple[str, ...]:
    """Return the words that start A's guest as it was started; none where that is not known, or not ours."""
    limit = plan.limits.command
    try:
        told = await host.told(*host.own("process", plan.source.qmp), limit=limit)
        process = Process(**told)
        ours = (await host.run("id", "-un", limit=limit)).strip()
        command = understood(process)
    except (OperatorError, TypeError):
        return ()
    if is_libvirts(command) or any(_is_given(each) for each in process.argv):
        return ()
    options = (option for option in command.options if option.name not in _ONLY_ONCE)
    becomes = process.user != ours and not command.has(*_BECOMES_ANOTHER)
    user = ("runuser", "-u", process.user, "--") if becomes else ()
    words = tuple(word for option in options for word in option.words)
    return ("env", "-C", process.directory, *user, process.argv[0], *words)


def _is_given(word: str) -> bool:
    """Tell whether a word names a file descriptor, which whoever has started QEMU had opened for it."""
    return any(key in word for key in ("fd=", "/dev/fd", "fds="))


async def boot_on_a(m: Migration) -> None:
    """Start the guest on A; what cannot be done is told, with what is typed instead."""
    words, limits = m.state.command, m.plan.limits
    images = listed(disk.image for disk in m.disks)
    if not words:
        m.report.note(
            f"start the guest on A as it was started there, on {images}: how that was is not known here, or "
            "libvirt's (virsh start)"
        )
        return
    command = started(words).command
    await make_lost(m.host_a, [*_made_by(command), m.plan.source.qmp], limits.command)
    log = (await m.place(m.host_a, m.disks[0].image, "qemu")).with_suffix(".qemu.log")
    by_hand = f"to start it by hand: {pasted(m.host_a.typed(words))}"
    try:
        qemu = await m.children.start("A's QEMU", m.host_a, log, list(words), released=True)
        m.need("A's QEMU", qemu.wait())
        where = monitor_a(m.plan, m.host_a)
        m.a = await m.during(reached("A's QEMU", where, m.plan), limits.start, "starting A's QEMU")
    except MigrationError as error:
        raise MigrationError(f"the guest could not be started on A: {error}; {by_hand}") from error
    m.no_longer_need("A's QEMU")
    qemu.leave()
    m.report.note(f"the guest was started again on A, process {qemu.pid}")


def _made_by(command: CommandLine | None) -> list[str]:
    return made_paths(command, "/") if command else []
