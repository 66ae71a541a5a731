"""What a round of chaos moves, and how, drawn from its seed: policy, channel, format and number of disks."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.link import Link, link
from tests.support.disks import MIB
from tests.support.many_disks import ManyDisks
from tests.support.processes import check
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.servers import Address, TcpAddress, UnixAddress, free_tcp_address
from tests.support.sshd import sshd
from tests.support.vms import NBD_MIGRATE, Role, running

ANY = "any"
SIZES = (32 * MIB, 8 * MIB, 16 * MIB)
SPEED = 5 * MIB
"""Bytes per second of each disk: the copying is most of what a migration does."""

ROOM = 160 * MIB
"""Of the file system that B's images are on."""

UNREADABLE = """
import errno
import os

preadv, splice = os.preadv, os.splice


def check(fd):
    if os.path.exists({trigger!r}) and os.readlink(f"/proc/self/fd/{{fd}}").startswith({images!r}):
        with open({failed!r}, "ab") as count:
            count.write(b".")
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def failing_preadv(fd, *others):
    check(fd)
    return preadv(fd, *others)


def failing_splice(source, *others, **more):
    check(source)
    return splice(source, *others, **more)


os.preadv, os.splice = failing_preadv, failing_splice
"""
"""What A's server is given to execute first: each read of an image fails, as long as there is the trigger."""

CHANNELS = ("unix", "plain", "tls", "ssh", "single")
"""Those of a plan, of which ``plain`` is over TCP; ``unix`` is what nothing but this host can see."""

CHOICES = {
    "policy": ("postcopy", "hybrid"),
    "channel": CHANNELS,
    "format": ("raw", "qcow2"),
    "disks": ("1", "2", "3"),
}
"""Of each of a round's properties, the values that it may have."""


@dataclass(frozen=True)
class Setting:
    """One way to migrate. ``disks`` is their number, as text; of qcow2 ones every other is raw."""

    engine: str
    policy: str
    channel: str
    format: str
    disks: str

    def __str__(self) -> str:
        return f"{self.engine} {self.policy} {self.channel} {self.format} {self.disks}"

    @property
    def has_link(self) -> bool:
        """Whether what B reads of A's disks goes through a proxy of ours."""
        return self.channel == "single" or (self.engine == "overlay" and self.channel != "ssh")

    @property
    def victims(self) -> list[Role]:
        """The processes that there are."""
        never = {Role.FENCE, Role.B_AGAIN}
        if self.engine != "overlay":
            never |= {Role.OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
        if self.engine != "overlay" or self.disks == "1":
            never.add(Role.ONE_OVERLAY)
        if self.channel != "ssh":
            never |= {Role.TUNNEL, Role.CONNECTION}
        if self.channel != "single":
            never.add(Role.CHANNEL)
        return [role for role in Role if role not in never]


@dataclass(frozen=True)
class Place:
    """A guest that runs on A, a plan to move it, and what faults are made with.

    ``room`` is the file system of B's images, of ``size`` bytes; reads of A's fail as long as there is the
    file ``trigger``, and write to ``failed`` then.
    """

    stage: ManyDisks
    link: Link | None
    room: Path
    trigger: Path
    failed: Path
    size: int = ROOM


@contextmanager
def drawn_place(directory: Path, setting: Setting) -> Iterator[Place]:
    """A round's. Its operator's ssh, state and sockets are its own. It needs root."""
    # By the first of these names its guards are found.
    home, runtime = Path(f"{directory}.state"), directory / "run"
    runtime.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.enter_context(environment(XDG_STATE_HOME=str(home), XDG_RUNTIME_DIR=str(runtime)))
        kind = Qcow2Disks if setting.format == "qcow2" else ManyDisks
        made = kind(directory, setting.engine, SIZES[: int(setting.disks)])
        made.change("limits", speed=SPEED, reconnect_delay=2, recover=20.0, restarts=50)
        made.change("destination", policy=setting.policy)
        if setting.disks == "1":
            made.change("finish", move_aside=str(made.disks[0].moved))
        if setting.channel == "ssh":
            reach_b_by_ssh(made, stack)
        if setting.channel != "unix":
            made.change("export", uri=free_tcp_address().uri("vm"))
            there = free_tcp_address()
            made.change("destination", migration=f"tcp:{there.host}:{there.port}")
            made.change("channel", kind=setting.channel)
        room = stack.enter_context(small_file_system(directory / "b"))
        for number, disk in enumerate(made.disks):
            made.disks[number] = dataclasses.replace(disk, target=room / disk.target.name)
            made.change_disk(number, target=str(made.disks[number].target))
        trigger, failed = directory / "unreadable", directory / "failed"
        lead = stack.enter_context(led_through(made, setting)) if setting.has_link else None
        fail_reads(made, trigger, failed, lead.on_a if lead else "")
        stack.enter_context(running(made))
        yield Place(made, lead.link if lead else None, room, trigger, failed)


@contextmanager
def small_file_system(directory: Path) -> Iterator[Path]:
    """A tmpfs with room for B's images, which can be taken from it and given back."""
    directory.mkdir()
    check("mount", "-t", "tmpfs", "-o", f"size={ROOM >> 10}k", "tmpfs", directory)
    try:
        yield directory
    finally:
        check("umount", "--lazy", directory)


@dataclass(frozen=True)
class Lead:
    """A link, and the line of a shell script by which A's server takes it, where that is who connects."""

    link: Link
    on_a: str


@contextmanager
def led_through(made: ManyDisks, setting: Setting) -> Iterator[Lead]:
    """Have what B reads of A's disks go through a link: nbd-overlay, or A's end of the single channel."""
    where = made.plan.export.address
    listen: Address
    real: Address
    if setting.channel == "single":
        tcp = free_tcp_address()
        listen, real = tcp, TcpAddress(tcp.host, int(made.plan.way_to_b.rpartition(":")[2]))
        before, after = f":{real.port}", f":{tcp.port}"
    elif where.socket:
        listen, real = UnixAddress(made.directory / "link"), UnixAddress(Path(where.socket))
        before, after = f"socket={real.path}", f"socket={listen.path}"
    else:
        tcp = free_tcp_address()
        listen, real = tcp, TcpAddress(where.host, where.port)
        before, after = f":{real.port}/", f":{tcp.port}/"
    line = f"before={before} after={after}; " + 'set -- "${@/"$before"/"$after"}"'
    with link(listen, real) as passing:
        if setting.channel == "single":
            yield Lead(passing, line)
        else:
            made.change("destination", bin=tools(made.directory / "bin-b", "nbd-overlay", line))
            yield Lead(passing, "")


def fail_reads(made: ManyDisks, trigger: Path, failed: Path, line: str) -> None:
    """Have A's server fail to read as long as there is the trigger; ``line`` is executed before it starts."""
    code = made.directory / "lib" / "sitecustomize.py"
    code.parent.mkdir()
    values = {"trigger": str(trigger), "failed": str(failed), "images": str(made.directory / "a")}
    code.write_text(UNREADABLE.format(**values))
    script = f"{line}\nexport PYTHONPATH={code.parent}"
    made.change("source", bin=tools(made.directory / "bin-a", "nbdserve", script))


def tools(directory: Path, name: str, script: str) -> str:
    """A directory in which this command is preceded by a script, and the others are what they are."""
    directory.mkdir()
    for command in ("nbdserve", "nbd-overlay", "nbd-migrate"):
        real = NBD_MIGRATE.with_name(command)
        if command == name:
            (directory / command).write_text(f'#!/bin/bash\n{script}\nexec {real} "$@"\n')
            (directory / command).chmod(0o755)
        else:
            (directory / command).symlink_to(real)
    return str(directory)


def reach_b_by_ssh(made: ManyDisks, stack: ExitStack) -> None:
    """Have B be this host's sshd, to which the ssh on the PATH has the key."""
    place = made.directory / "ssh"
    place.mkdir()
    server = stack.enter_context(sshd(place))
    ssh = place / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {shlex.join(server.options)} "$@"\n')
    ssh.chmod(0o755)
    stack.enter_context(environment(PATH=f"{place}:{os.environ['PATH']}"))
    address = server.address
    made.change(
        "destination", host=f"ssh://{address.host}:{address.port}", bin=str(Path(sys.executable).parent)
    )


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
