"""Whether B's processor can be what the guest takes for its own."""

from __future__ import annotations

from recipes.checks.started import Started
from recipes.discovery.command_line.options import CommandLine
from recipes.errors import MigrationError
from recipes.hosts.host import Host

HOSTS_OWN = ("host", "max")
"""Models of -cpu that are all that the host's processor can do."""

SHOWN = 8
"""How many features are named."""


async def check_processor(host_a: Host, host_b: Host, started: Started, limit: float) -> list[str]:
    """Return what may go wrong: features of A's processor that B's has not, where the guest sees them.

    Raises MigrationError where B has no KVM for a guest that uses it.
    """
    command = started.command
    if command is None or not uses_kvm(command):
        return []
    if not await host_b.test("-e", "/dev/kvm", limit):
        raise MigrationError(
            "destination.qemu: it uses KVM, and B has no /dev/kvm; see that its processor's virtualization "
            "is switched on and the module kvm loaded"
        )
    if command.last("cpu").split(",")[0] not in HOSTS_OWN:
        return []
    missing = sorted(await _features(host_a, limit) - await _features(host_b, limit))
    if not missing:
        return []
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return [
        f"the guest has A's processor (-cpu {command.last('cpu')}), and B's lacks "
        f"{', '.join(missing[:SHOWN])}{more}: a guest that uses them would crash there; a named model would "
        "keep it from that"
    ]


def uses_kvm(command: CommandLine) -> bool:
    """Tell whether a QEMU is told to use KVM, and nothing else."""
    accelerators = [each.arguments.text("accel") for each in command.named("accel")]
    accelerators += [each.arguments.text("accel") for each in command.named("machine")]
    chosen = [each for each in accelerators if each]
    # Of several, as in kvm:tcg, QEMU takes the first that works.
    return command.has("enable-kvm") or (bool(chosen) and all(each == "kvm" for each in chosen))


async def _features(host: Host, limit: float) -> set[str]:
    said = await host.run("cat", "/proc/cpuinfo", limit=limit)
    lines = (line.partition(":") for line in said.splitlines())
    return set(next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), []))
