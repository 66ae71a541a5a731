"""Why a guest cannot be moved, whatever its disks are. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from recipes.discovery.command_line.host_local import descriptor
from recipes.discovery.command_line.options import CommandLine, Option
from recipes.discovery.guest import Guest

NOT_UNDERSTOOD = ("fda", "fdb", "mtdblock", "sd", "iscsi", "writeconfig")
"""Options that are not understood here; those of diskettes are where there is none in the drive any more."""

MAKES_DEVICES = ("usbdevice", "watchdog", "virtfs", "soundhw", "audio")
"""Options of which QEMU may make devices without a name."""


def refusals(command: CommandLine, guest: Guest, ignored: Collection[Option]) -> Iterator[str]:
    """Yield a phrase for each thing that cannot be moved; ``ignored`` options go anyway."""
    if guest.state != "running":
        yield f"it does not run, it is in state {guest.state}; start it first (cont)"
    yield from (f"QEMU says that it cannot migrate: {reason}" for reason in guest.blocked)
    for option in command.options:
        if option not in ignored:
            yield from _of_option(option, guest)
    yield from _plugged(command, guest)


def _of_option(option: Option, guest: Guest) -> Iterator[str]:
    if option.name in NOT_UNDERSTOOD and not _is_empty(option, guest):
        yield f"{option} is not understood here"
    if option.name == "snapshot" or (option.name == "drive" and option.arguments.is_on("snapshot")):
        yield f"{option}: what the guest writes to a snapshot is in no file that has a name"
    if option.name == "drive" and option.arguments.text("if") in ("sd", "mtd", "xen", "scsi"):
        yield f"{option}: drives of this interface are not understood here"
    if option.name == "device" and option.arguments.text("driver").startswith("vhost-user-blk"):
        yield f"{option}: its disk is another process's"
    if passed := descriptor(option):
        yield f"{passed}: a descriptor that was opened by whoever started QEMU cannot be opened again on B"


def _is_empty(option: Option, guest: Guest) -> bool:
    """Tell whether this is the option of a drive for diskettes that has none in it any more."""
    media = (drive for drive in guest.drives if drive.type == "floppy" and drive.node)
    return option.name in ("fda", "fdb") and not any(media)


def _plugged(command: CommandLine, guest: Guest) -> Iterator[str]:
    """Yield devices that are there and not on the command line, and the other way round."""
    written = [each.arguments.text("id") for each in command.named("device")]
    names = set(written) - {""}
    for name in guest.plugged:
        if name not in names:
            yield f"the device {name} was plugged in while it ran; unplug it (device_del)"
    for name in sorted(names - set(guest.plugged)):
        yield f"the device {name} of its command line was unplugged while it ran"
    nameless = written.count("") + sum(
        option.arguments.text("if") in ("virtio", "xen") for option in command.named("drive")
    )
    if len(guest.anonymous) > nameless and not command.has(*MAKES_DEVICES):
        kinds = ", ".join(guest.anonymous)
        yield f"of its devices without a name ({kinds}) some were plugged in while it ran; unplug them"
