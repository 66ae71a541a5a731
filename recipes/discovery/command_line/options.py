"""A QEMU's command line as a list of options. Pure: words in, values out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line import arguments
from recipes.discovery.command_line.arguments import Arguments

# fmt: off
ALONE = frozenset(
    [
        "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize",
        "enable-fips", "enable-kvm",
        "enable-sync-profile", "frame", "full-screen", "jitdump", "mem-prealloc", "no-acpi",
        "no-fd-bootchk", "no-frame", "no-hpet", "no-kvm", "no-quit", "no-reboot", "no-shutdown",
        "no-user-config", "nodefaults", "nodefconfig", "nographic", "nouserconfig", "old-param",
        "only-migratable", "perfmap", "portrait", "preconfig", "s", "sdl", "semihosting", "singlestep",
        "snapshot", "usb", "win2k-hack", "xen-attach", "xen-domid-restrict",
    ]
)
# fmt: on
"""Options of qemu-system-x86_64 that have no argument, from QEMU 4 to 10."""

IMPLIED = {
    "accel": "accel",
    "audiodev": "driver",
    "blockdev": "driver",
    "boot": "order",
    "chardev": "backend",
    "device": "driver",
    "display": "type",
    "fsdev": "fsdriver",
    "icount": "shift",
    "m": "size",
    "machine": "type",
    "mon": "chardev",
    "name": "guest",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "numa": "type",
    "object": "qom-type",
    "option-rom": "romfile",
    "plugin": "file",
    "sandbox": "enable",
    "smp": "cpus",
    "tpmdev": "type",
    "trace": "enable",
    "vnc": "vnc",
}
"""Of the options whose first value may stand alone: its key."""

KEYED = frozenset(
    [
        *IMPLIED,
        *("acpitable", "add-fd", "drive", "fw_cfg", "global", "overcommit", "rtc", "run-with", "smbios"),
        *("spice", "virtfs"),
    ]
)
"""Options whose argument has keys."""

# fmt: off
PLAIN = frozenset(
    [
        "D", "L", "append", "audio", "bios", "cdrom", "chroot", "compat", "cpu", "d",
        "debugcon", "dfilter", "dtb", "dump-vmstate", "echr", "fda", "fdb", "gdb", "hda", "hdb", "hdc",
        "hdd", "id", "incoming", "initrd", "iscsi", "k", "kernel", "loadvm", "mem-path", "monitor", "msg",
        "mtdblock", "parallel", "pflash", "pidfile", "qmp", "qmp-pretty", "readconfig", "rotate", "runas",
        "sd", "seed", "serial", "set", "shim", "soundhw", "tb-size", "usbdevice", "uuid", "vga", "watchdog",
        "watchdog-action", "writeconfig", "action", "xen-domid",
    ]
)
# fmt: on
"""All others, which have an argument."""

SAME = {"M": "machine"}
"""Other names of options."""


@dataclass(frozen=True)
class Option:
    """One option: its name without the dash, and its argument, or None where it has none."""

    name: str
    value: str | None = None

    @property
    def arguments(self) -> Arguments:
        """Return the argument taken apart."""
        return arguments.parse(self.value or "", IMPLIED.get(self.name, ""))

    def having(self, changed: Arguments) -> Option:
        """Return the option with another argument."""
        return Option(self.name, str(changed))

    @property
    def words(self) -> tuple[str, ...]:
        """Return the option as words of a command line."""
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)

    def __str__(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class CommandLine:
    """How a QEMU was started: the program, and its options in their order."""

    program: str
    options: tuple[Option, ...]

    def named(self, *names: str) -> Iterator[Option]:
        """Yield the options of these names."""
        return (option for option in self.options if option.name in names)

    def has(self, *names: str) -> bool:
        """Tell whether there is one of these options."""
        return any(self.named(*names))

    def last(self, name: str) -> str:
        """Return the argument of the last option of this name, or nothing."""
        return next((option.value or "" for option in reversed(self.options) if option.name == name), "")

    def replaced(self, before: Option, after: Sequence[Option]) -> CommandLine:
        """Return the same with other options in the place of one."""
        found = [[each] if each is not before else after for each in self.options]
        return CommandLine(self.program, tuple(option for each in found for option in each))

    def settled(self) -> CommandLine:
        """Return the same with what ``-set`` changes in the options that it changes.

        Raises UsageError for one that changes none.
        """
        command = self
        for option in self.named("set"):
            path, _, value = (option.value or "").partition("=")
            group, _, rest = path.partition(".")
            name, _, key = rest.partition(".")
            of_group = [each for each in command.named(group) if each.name in KEYED]
            changed = next((each for each in of_group if each.arguments.text("id") == name), None)
            if changed is None or not key:
                raise UsageError(f"{option} changes no option of the command line")
            given = changed.arguments
            after = changed.having(Arguments({**given.values, key: value}, given.implied, given.is_json))
            command = command.replaced(option, []).replaced(changed, [after])
        return command


def parse(argv: Sequence[str]) -> CommandLine:
    """Take a command line apart.

    Raises UsageError with the name of an option that is not known, or that has no argument where it must.
    """
    if not argv or not PurePath(argv[0]).name:
        raise UsageError("this process has no command line")
    options = []
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            # QEMU takes that for its first disk.
            options.append(Option("hda", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        name = SAME.get(name, name)
        if name in ALONE:
            options.append(Option(name))
        elif name in KEYED or name in PLAIN:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{word} has no argument")
            options.append(Option(name, value))
        else:
            raise UsageError(f"the option {word} is not known here")
    return CommandLine(argv[0], tuple(options))
