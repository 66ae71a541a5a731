"""How RAM and disk get from A to B, both on the loopback: in one channel, or each in a connection."""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.channel.loads import Load
from tests.support.channels import NBDSERVE, Sender
from tests.support.processes import Argument, Process, dying_with_parent, listens, wait_until
from tests.support.servers import free_tcp_address, nbdserve
from tests.support.sshd import sshd
from tests.support.tls import Authority
from tests.support.vms import ROOT


@dataclass(frozen=True)
class Case:
    """What moves."""

    name: str
    ram: bool
    disk: bool


SIZE = 64 << 20
"""Bytes of the disk: more than a processor's cache holds."""

BOTH = Case("RAM and disk", ram=True, disk=True)
RAM = Case("RAM alone", ram=True, disk=False)
DISK = Case("disk alone", ram=False, disk=True)
IDLE = Case("nothing", ram=False, disk=False)


@dataclass(frozen=True)
class Wire:
    """What is between the hosts: bytes per second, and seconds of round trip."""

    rate: float
    trip: float


@dataclass(frozen=True)
class Running:
    """A way that works: what counts RAM, where the disk is, and the processes of each end.

    Who reads the disk is not among them yet.
    """

    ram: Load
    disk: str
    source: Sequence[int]
    destination: Sequence[int]


Start = Callable[[Path, Case], AbstractContextManager[Running]]


def channel(carrier: str, wire: Wire | None = None) -> Start:
    """Return what starts a channel over ``tcp``, ``tls`` or ``ssh``."""

    @contextmanager
    def start(directory: Path, case: Case) -> Iterator[Running]:
        with ExitStack() as stack:
            token = directory / "token"
            token.touch(mode=0o600)
            token.write_text("0123456789abcdef" * 4)
            incoming, nbd, path = (directory / name for name in ("incoming", "nbd", "path"))
            sink = stack.enter_context(ending(Load(directory, "sink", incoming)))
            wait_until(lambda: listens(incoming), "the sink")
            port = free_tcp_address().port
            place = f"unix:{path}" if carrier == "ssh" else f"127.0.0.1:{port}"
            ends = {"server": list[Argument](), "client": list[Argument]()}
            if carrier == "tls":
                for role, words in ends.items():
                    words += ["--tls-certificates", identities(directory) / role]
            pid_file = directory / "listening.pid"
            listening: list[Argument] = ["--listen", place, "--socket", nbd, "--incoming", f"unix:{incoming}"]
            common: list[Argument] = ["--token-file", token]
            destination = stack.enter_context(
                Process(
                    [NBDSERVE, "channel", *listening, *common, *ends["server"], "--pid-file", pid_file],
                    directory / "listening.log",
                )
            )
            destination.wait_for_pid_file(pid_file)
            behind = [destination.pid, sink.pid]
            if carrier == "ssh":
                server = stack.enter_context(sshd(made(directory / "sshd")))
                behind += sshd_here()
                where = f"ssh://{getpass.getuser()}@{server.address.host}:{server.address.port}{path}"
                # The port stands in the address.
                options = [each for each in server.options if each not in ("-p", str(server.address.port))]
                common += ["--ssh", shlex.join(["ssh", *options]), "--remote", NBDSERVE]
            else:
                where = f"127.0.0.1:{through(stack, directory, wire, (port, 'to-b'))[0]}"
            disk = ["--connect", where, "--export", f"disk={image(directory)}"]
            sender = Sender([*disk, *common, *ends["client"]], directory)
            stack.callback(sender.close)
            wait_until(lambda: "session begins" in destination.output(), "the channel")
            source = [sender.worker]
            if case.ram:
                source.append(stack.enter_context(ending(Load(directory, "feed", stdout=sender.stream))).pid)
            yield Running(sink, f"nbd+unix:///disk?socket={nbd}", source, behind)

    return start


def apart(*, tls: bool = False, wire: Wire | None = None) -> Start:
    """Return what starts two connections, of which each has what QEMU and nbdserve have without a channel."""

    @contextmanager
    def start(directory: Path, case: Case) -> Iterator[Running]:
        with ExitStack() as stack:
            here = free_tcp_address()
            for_ram = free_tcp_address().port
            behind = [identities(directory) / "server"] if tls else []
            sink = stack.enter_context(ending(Load(directory, "sink", str(for_ram), *behind)))
            words: list[Argument] = ["-r", "-f", "raw", image(directory)]
            if tls:
                words += ["--tls-require", "--tls-certificates", identities(directory) / "server"]
            server = stack.enter_context(nbdserve(*words, directory=directory, at=here))
            ram, disk = through(stack, directory, wire, (for_ram, "to-b"), (here.port, "to-a"))
            source = [server.process.pid]
            if case.ram:
                mine = [identities(directory) / "client"] if tls else []
                source.append(stack.enter_context(ending(Load(directory, "feed", str(ram), *mine))).pid)
            uri = f"nbd://127.0.0.1:{disk}"
            if tls:
                uri = f"nbds://localhost:{disk}?tls-certificates={identities(directory) / 'client'}"
            yield Running(sink, uri, source, [sink.pid])

    return start


@contextmanager
def ssh_cat(directory: Path, case: Case) -> Iterator[Running]:
    """As many bytes through ``ssh``, in one stream, to ``cat``."""
    with ExitStack() as stack:
        server = stack.enter_context(sshd(made(directory / "sshd")))
        fifo = directory / "fifo"
        os.mkfifo(fifo)
        # Opened so that nobody waits for somebody at the other end.
        taken = os.open(fifo, os.O_RDWR)
        count = stack.enter_context(ending(Load(directory, "count", stdin=taken)))
        read_end, write_end = os.pipe()
        source = [stack.enter_context(ending(Load(directory, "feed", stdout=write_end))).pid]
        words = [*dying_with_parent(signal.SIGKILL), *server.prefix, "-T", f"cat > {fifo}"]
        ssh = stack.enter_context(subprocess.Popen(words, stdin=read_end))
        stack.callback(ssh.kill)
        for each in (taken, read_end, write_end):
            os.close(each)
        wait_until(lambda: count.moved > 0, "ssh")
        yield Running(count, "", [*source, ssh.pid], [*sshd_here(), count.pid])


def sshd_here() -> list[int]:
    """Return the sshd that was started here."""
    return [each.pid for each in psutil.Process().children() if each.name() == "sshd"]


@contextmanager
def ending(load: Load) -> Iterator[Load]:
    """End a load behind this."""
    try:
        yield load
    finally:
        load.close()


def through(stack: ExitStack, directory: Path, wire: Wire | None, *passages: tuple[int, str]) -> list[int]:
    """Return the ports by which these are reached, ``to-a`` or ``to-b``, over a wire if there is one."""
    if wire is None:
        return [port for port, _ in passages]
    ports = [free_tcp_address().port for _ in passages]
    led = [f"{own}:{port}:{way}" for own, (port, way) in zip(ports, passages, strict=True)]
    words = [sys.executable, "-m", "tests.bench.channel.wire", str(wire.rate), str(wire.trip), *led]
    process = stack.enter_context(Process(words, directory / "wire.log", cwd=ROOT))
    process.wait_for_line("ready")
    return ports


def identities(directory: Path) -> Path:
    """Return where certificates of a server and of a client are; they are made where they are not there."""
    place = directory / "pki"
    if not place.exists():
        authority = Authority.create(made(place) / "ours")
        for role in ("server", "client"):
            authority.issue(place / role, role)
    return place


def image(directory: Path) -> Path:
    """Return a disk; it is made where it is not there."""
    path = directory / "disk"
    if not path.exists():
        path.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    return path


def made(directory: Path) -> Path:
    """Make a directory."""
    directory.mkdir()
    return directory
