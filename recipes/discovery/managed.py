"""Who else may use a guest's monitor, by its command line. Pure."""

from __future__ import annotations

from recipes.discovery.command_line.chardevs import monitors
from recipes.discovery.command_line.options import CommandLine

_OF_LIBVIRT = ("charmonitor", "masterKey0")
"""What libvirt calls its monitor and its key."""


def is_libvirts(command: CommandLine) -> bool:
    """Tell whether libvirt has started this QEMU."""
    names = {each.arguments.text("id") for each in command.named("chardev", "object")}
    return not names.isdisjoint(_OF_LIBVIRT)


def busy(command: CommandLine, name: str) -> str:
    """Say why no monitor of a guest answers, and what can be done."""
    if is_libvirts(command):
        return (
            f"the guest {name} is libvirt's, which uses its only monitor itself; move it with virsh migrate, "
            "or start it with a second one (<qemu:commandline>, -qmp unix:PATH,server=on,wait=off)"
        )
    places = [each.device.listens for each in monitors(command) if each.device.listens]
    if not places:
        return f"the guest {name} has no QMP monitor; start it with -qmp unix:PATH,server=on,wait=off"
    used = "is its only monitor, and" if len(places) == 1 else "are its monitors, and"
    return (
        f"{' and '.join(places)} {used} another client is connected; end that (a management tool, qmp-shell, "
        "another migration), or start the guest with one more -qmp"
    )
