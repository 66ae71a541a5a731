"""The command line of B's QEMU, made of that of A's and of what the guest is now. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from recipes.discovery.command_line import chardevs, host_local
from recipes.discovery.command_line.arguments import Arguments
from recipes.discovery.command_line.chardevs import SHORT, Monitor, of_chardev, of_short
from recipes.discovery.command_line.host_local import Local
from recipes.discovery.command_line.options import CommandLine, Option
from recipes.discovery.drive_options import DriveOptions, FoundDisk, FoundFlash, Line, Target
from recipes.discovery.guest import Guest
from recipes.discovery.refusals import refusals

FOR_A = ("incoming", "S", "daemonize")
"""Options of A's start, which plans have in another way."""

ONCE = ("loadvm", "preconfig")
"""Options of A's start that have no meaning for B."""

WINDOWS = ("gtk", "sdl", "curses", "cocoa", "spice-app")
"""Displays that are on the host's own screen."""


@dataclass(frozen=True)
class Derived:
    """What was made of a command line.

    program  the first word
    lines    B's options, in their order
    disks    what moves
    notes    what was left out, and why
    flash    chips that the guest writes to
    same     files that B has to have under the same paths, with the same content
    local    what must be on B
    busy     what two QEMUs on one machine cannot both have
    refused  why the guest cannot be moved; then the rest means nothing
    user     as whom QEMU goes on when it has started; empty if as whoever starts it
    """

    program: str
    lines: tuple[Line, ...]
    disks: tuple[FoundDisk, ...]
    notes: tuple[str, ...]
    local: tuple[Local, ...]
    busy: tuple[str, ...]
    refused: tuple[str, ...]
    user: str = ""
    same: tuple[str, ...] = ()
    flash: tuple[FoundFlash, ...] = ()


def made_paths(command: CommandLine, directory: str) -> list[str]:
    """Return the absolute paths of what such a QEMU makes at its start: sockets, logs, its pid file."""
    found = []
    for option in command.options:
        if option.name in host_local.MADE:
            found.append(option.value or "")
        elif option.name in SHORT:
            found.append(of_short(option.value or "").made)
        found += [option.arguments.text(key) for key in host_local.made_keys(option)]
        found.append(_vnc_socket(option))
    return [posixpath.normpath(posixpath.join(directory, path)) for path in found if path]


def _vnc_socket(option: Option) -> str:
    """Return the socket of -vnc, or of -display vnc=."""
    address = option.arguments.text("vnc") if option.name in ("vnc", "display") else ""
    return address.removeprefix("unix:") if address.startswith("unix:") else ""


def derive(
    command: CommandLine,
    guest: Guest,
    directory: str,
    *,
    address: str = "",
    monitor: Monitor | None = None,
    names: Mapping[str, str] | None = None,
    target: Target = lambda image, _: image,
) -> Derived:
    """Derive B's command line.

    ``directory`` is the working directory of A's QEMU; ``address`` that of its monitor, for messages;
    ``monitor`` the one that B gets in any case; ``names`` what is called otherwise on B, by its absolute
    path; ``target`` what a file of A's is called on B that moves.
    """
    drives = DriveOptions(command, guest, directory, address, target)
    return _Derivation(command, guest, directory, drives, monitor, names or {}).made()


class _Derivation:
    """The work of derive()."""

    def __init__(
        self,
        command: CommandLine,
        guest: Guest,
        directory: str,
        drives: DriveOptions,
        monitor: Monitor | None,
        names: Mapping[str, str],
    ) -> None:
        self._command = command
        self._guest = guest
        self._directory = directory
        self._names = names
        self._drives = drives
        self._replaced_monitor = monitor.options if monitor else ()
        self._dropped = {*drives.dropped, *self._replaced_monitor}
        self._notes = list(self._drives.notes)
        self._monitors = 0

    def made(self) -> Derived:
        """Do it."""
        lines = [line for option in self._command.options for line in self._lines(option)]
        lines = self._with_display(self._with_machine([*lines, *self._drives.added]))
        options = [line.option for line in lines]
        program = self._command.program
        return Derived(
            program=self._absolute(program) if "/" in program else program,
            lines=tuple(lines),
            disks=tuple(self._drives.disks),
            notes=tuple(self._notes),
            local=tuple(self._local(options)),
            busy=tuple(dict.fromkeys(each for option in options for each in host_local.ports(option))),
            refused=(*refusals(self._command, self._guest, self._replaced_monitor), *self._drives.refused),
            user=self._user(),
            same=tuple(dict.fromkeys(self._drives.same)),
            flash=tuple(self._drives.flash),
        )

    def _local(self, options: Sequence[Option]) -> Iterator[Local]:
        """Yield what must be on B, each once; not what the migration makes."""
        made = {flash.target for flash in self._drives.flash}
        for each in dict.fromkeys(each for option in options for each in host_local.needed(option)):
            if each.path not in made:
                yield each

    def _absolute(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._directory, path))

    def _rename(self, path: str) -> str:
        """Return what something that QEMU makes is called on B."""
        path = self._absolute(path)
        return self._names.get(path, path)

    def _user(self) -> str:
        """Return the user that QEMU becomes."""
        run_with = (each.arguments.text("user") for each in self._command.named("run-with"))
        return self._command.last("runas") or next(run_with, "")

    def _lines(self, option: Option) -> Iterator[Line]:
        """Yield what becomes of an option."""
        if option in self._dropped or option.name in FOR_A:
            return
        if option in self._drives.replaced:
            yield self._drives.replaced[option]
        elif option.name in ONCE:
            self._notes.append(f"{option}, which was for A's start")
        elif option.name in ("qmp", "qmp-pretty"):
            yield from self._monitor(option)
        elif (after := self._renamed(option)) != option:
            yield Line(after, f"A's is {option}")
        elif option.name in ("curses", "sdl") or (
            option.name == "display" and option.arguments.text("type") in WINDOWS
        ):
            yield Line(Option("display", "none"), f"A's is {option}, a window there")
        else:
            yield Line(option)

    def _renamed(self, option: Option) -> Option:
        """Return an option with B's names, and with absolute paths."""
        if option.name in host_local.MADE:
            return Option(option.name, self._rename(option.value or ""))
        if option.name in SHORT:
            return Option(option.name, chardevs.moved(option.value or "", self._rename))
        if option.name == "chardev" and (changed := self._chardev(option.arguments)) != option.arguments:
            return option.having(changed)
        if (path := _vnc_socket(option)) and path != self._rename(path):
            return option.having(option.arguments.having(vnc=f"unix:{self._rename(path)}"))
        if option.name != "chardev" and (keys := host_local.made_keys(option)):
            given = option.arguments
            renamed = {key: self._rename(given.text(key)) for key in keys}
            if any(given.text(key) != path for key, path in renamed.items()):
                return option.having(given.having(**renamed))
        return host_local.relative(option, self._directory)

    def _chardev(self, given: Arguments) -> Arguments:
        """Return a ``-chardev`` with B's names."""
        device = of_chardev(given)
        if device.path:
            path = self._rename(device.path) if device.made else self._absolute(device.path)
            given = given.having(path=path)
        if given.text("logfile"):
            given = given.having(logfile=self._rename(given.text("logfile")))
        return given

    def _monitor(self, option: Option) -> Iterator[Line]:
        """Write another QMP monitor than the one that B gets in any case: plans have -qmp for that."""
        value = option.value or ""
        kind, _, name = value.partition(":")
        if kind in ("stdio", "none"):
            self._notes.append(f"{option}, as B's QEMU has no terminal")
            return
        if kind != "chardev":
            self._monitors += 1
            name = f"monitor{self._monitors}"
            made = chardevs.spelled_out(chardevs.moved(value, self._rename), name)
            yield Line(Option("chardev", str(made)), f"A's is {option}")
        yield Line(Option("mon", f"chardev={name},mode=control"))

    def _with_machine(self, lines: list[Line]) -> list[Line]:
        """Pin the machine's type to its version, as B's newest may be another."""
        kind = self._guest.machine.type
        for number, line in enumerate(lines):
            if line.option.name == "machine" and "type" in line.option.arguments.values:
                given = line.option.arguments
                if given.text("type") == kind:
                    return lines
                pinned = Line(line.option.having(given.having(type=kind)), f"A's is {given.text('type')}")
                return [*lines[:number], pinned, *lines[number + 1 :]]
        return [Line(Option("machine", kind), "what A's QEMU has taken by itself"), *lines] if kind else lines

    def _with_display(self, lines: list[Line]) -> list[Line]:
        """See that B's QEMU opens no window."""
        chosen = {"display", "nographic", "vnc", "spice"}
        if not self._guest.window or chosen.intersection(line.option.name for line in lines):
            return lines
        return [*lines, Line(Option("display", "none"), "A's may be a window there")]
