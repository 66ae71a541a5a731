"""The process of a guest's QEMU, as its host sees it: a small program that runs there, and prints JSON.

Its argument is a process id, or the address of a QMP monitor.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from nbdserve.common import program
from nbdserve.common.errors import ConnectError, OperatorError, UsageError
from recipes.connections.address import host_and_port
from recipes.discovery.command_line.options import parse

LIMIT = 10
"""Seconds in which a monitor's socket accepts a connection."""


@dataclass(frozen=True)
class Process:
    """A process.

    pid        of it
    argv       its command line
    directory  what relative paths on its command line are relative to
    user       who it runs as
    configs    what is in the files that it has read as ``-readconfig``, by the name that it gives them
    files      what it has open, by absolute paths without links
    """

    pid: int
    argv: tuple[str, ...]
    directory: str
    user: str
    configs: dict[str, str]
    files: tuple[str, ...] = ()


def find(source: str) -> Process:
    """Return the process with this id, or the one that listens at this monitor. Raises OperatorError."""
    try:
        pid = int(source) if source.isdecimal() else listener(source)
    except ValueError as error:
        raise UsageError(
            f"{source!r} is neither a process id nor a monitor: write PID, PATH or HOST:PORT"
        ) from error
    try:
        found = psutil.Process(pid)
        argv, directory, user = tuple(found.cmdline()), start_directory(found), found.username()
        files = open_files(pid)
    except (psutil.NoSuchProcess, FileNotFoundError, OverflowError) as error:
        raise UsageError(f"there is no process {pid}") from error
    except (psutil.AccessDenied, PermissionError) as error:
        raise OperatorError(f"process {pid} is another user's; look at it as root") from error
    if not argv:
        raise UsageError(f"process {pid} has no command line")
    return Process(pid, argv, directory, user, configs(argv, directory), files)


def start_directory(process: psutil.Process) -> str:
    """Return the directory in which a process was started.

    ``-daemonize`` leaves it for the root directory; then its environment says where the shell was.
    """
    directory = process.cwd()
    if directory != "/" or not {"-daemonize", "--daemonize"}.intersection(process.cmdline()):
        return directory
    return process.environ().get("PWD") or directory


def open_files(pid: int) -> tuple[str, ...]:
    """Return the absolute paths of what a process has open; devices too."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # It may be closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(link))
    return tuple(sorted(path for path in found if path.startswith("/")))


def configs(argv: tuple[str, ...], directory: str) -> dict[str, str]:
    """Return the files that a QEMU has read as part of its command line."""
    try:
        names = [each.value or "" for each in parse(argv).named("readconfig")]
    except UsageError:
        # Whoever asked finds the same, and says so.
        return {}
    found = {}
    for name in names:
        if name.startswith("/dev/fd"):
            raise OperatorError(
                f"-readconfig {name} is a descriptor that whoever started QEMU has opened for it"
            )
        try:
            found[name] = Path(directory, name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no text"
            raise OperatorError(f"-readconfig {name}: it cannot be read any more: {reason}") from error
    return found


def listener(address: str) -> int:
    """Return the id of the process that listens at a socket's path, or at HOST:PORT."""
    if address.startswith("/"):
        holders = [each.pid for each in psutil.net_connections("unix") if str(each.laddr) == address]
        # It may have been bound by a relative path, or through a link.
        holders += [] if any(holders) else [_who_bound(address)]
    else:
        holders = [_listener_at(*host_and_port(address))]
    pid = next((pid for pid in holders if pid), None)
    if pid is None:
        reason = f"the process behind {address} is not seen here"
        raise OperatorError(f"{reason}; name it by its id, or look as root")
    return pid


def _listener_at(host: str, port: int) -> int | None:
    """Return the process that a connection to this address gets to; None where it is not seen, or nobody.

    Another one may listen at the same port of another address.
    """
    try:
        targets = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectError(f"{host}: {error.strerror or error}") from error
    found: list[Any] = psutil.net_connections("tcp")
    listening: dict[str, int | None] = {
        str(each.laddr[0]).partition("%")[0]: each.pid
        for each in found
        if each.status == psutil.CONN_LISTEN and each.laddr[1] == port
    }
    for family, _, _, _, target in targets:
        place = str(target[0]).partition("%")[0]
        # The kernel takes who has said the address before who has said none.
        everywhere = ("::",) if family == socket.AF_INET6 else ("0.0.0.0", "::")
        for each in (place, *everywhere):
            if each in listening:
                return listening[each]
    return None


def _who_bound(path: str) -> int:
    """Return the process that has begun to listen on a Unix socket, whoever is connected to it."""
    with socket.socket(socket.AF_UNIX) as client:
        # The kernel's own limit: with Python's a full queue is an error at once.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", LIMIT, 0))
        try:
            client.connect(path)
        except BlockingIOError as error:
            raise ConnectError(f"the monitor at {path} accepts nobody within {LIMIT} s") from error
        except OSError as error:
            raise ConnectError(f"no monitor at {path}: {error.strerror or error}") from error
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def main(source: str) -> int:
    """Print what was found as JSON."""
    print(json.dumps(asdict(find(source))))
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1])))
