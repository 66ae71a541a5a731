"""Two hosts that are reached by ssh alone, and a third from which a guest is moved between them.

    A  10.99.0.1    B  10.99.0.2    and C  10.99.0.3, where the orchestrator runs, and the switch is

Each is a network namespace; A and B have an sshd. They share one file system, but not the loopback, on which
the monitors listen that the orchestrator uses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import TAG
from tests.support.guests import short_directory
from tests.support.processes import Process, check, wait_until
from tests.support.sshd import SSHD
from tests.support.vms import NBD_MIGRATE, ROOT, Scene, running

ADDRESSES = {"a": "10.99.0.1", "b": "10.99.0.2", "c": "10.99.0.3"}
TOOLS = str(Path(sys.executable).parent)
LONG = 240.0
"""Seconds for a migration, each of whose steps is some commands over ssh."""

MONITOR = "127.0.0.1:4001"
"""Of both QEMUs, each on its own loopback."""


@dataclass(frozen=True)
class Network:
    """Three namespaces."""

    mark: str

    def name(self, host: str) -> str:
        """The name of the namespace of host ``a``, ``b`` or ``c``."""
        return f"nbd-{host}-{self.mark}"

    def on(self, host: str, *words: str) -> list[str]:
        """A command of a host."""
        return ["ip", "netns", "exec", self.name(host), *words]

    def cable(self, host: str, state: str) -> None:
        """Pull the cable of a host (``down``), or plug it in (``up``)."""
        check("ip", "-n", self.name("c"), "link", "set", f"to-{host}", state)


@contextmanager
def network() -> Iterator[Network]:
    """Make the hosts."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Network(str(os.getpid()))
    with ExitStack() as stack:
        for host in ADDRESSES:
            check("ip", "netns", "add", made.name(host))
            stack.callback(check, "ip", "netns", "delete", made.name(host))
            check("ip", "-n", made.name(host), "link", "set", "lo", "up")
        switch = ("ip", "-n", made.name("c"))
        check(*switch, "link", "add", "switch", "type", "bridge")
        for host in ("a", "b"):
            ends = ("name", f"to-{host}", "netns", made.name("c")), ("name", "eth0", "netns", made.name(host))
            check("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            check(*switch, "link", "set", f"to-{host}", "master", "switch", "up")
        for host, address in ADDRESSES.items():
            device = "switch" if host == "c" else "eth0"
            check("ip", "-n", made.name(host), "address", "add", f"{address}/24", "dev", device)
            check("ip", "-n", made.name(host), "link", "set", device, "up")
        yield made


class ApartScene(Scene):
    """A guest on A, a plan to move it to B by addresses of ssh, and the ssh of the operator on C."""

    def __init__(self, directory: Path, net: Network, runtime: Path, engine: str) -> None:
        super().__init__(directory, engine)
        self.net = net
        self.runtime = runtime
        self.change("source", qmp=MONITOR, host=f"ssh://root@{ADDRESSES['a']}")
        self.change("export", uri=f"nbd://{ADDRESSES['a']}:10809/vm")
        second = f"socket,id=second,path={self.monitor_b},server=on,wait=off"
        self.change(
            "destination",
            qmp=MONITOR,
            host=f"ssh://root@{ADDRESSES['b']}:22",
            qemu=(*self.plan.destination.qemu, "-chardev", second, "-mon", "chardev=second,mode=control"),
            migration=f"tcp:{ADDRESSES['b']}:4444",
        )
        self.change("limits", connect=60.0, command=60.0)

    def source_qemu(self) -> list[str]:
        """A's command line."""
        return [*super().source_qemu(), "-qmp", f"tcp:{MONITOR},server=on,wait=off"]

    @property
    def environment(self) -> dict[str, str]:
        """Of the orchestrator: its ssh is the operator's, with his configuration."""
        return {"PATH": f"{self.directory}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(self.runtime)}

    def migrate(self, *words: str, log: str = "run.log") -> Process:
        """``nbd-migrate`` on C."""
        argv = self.net.on("c", str(NBD_MIGRATE), *words)
        return Process(argv, self.directory / log, env=self.environment)

    def run(self, *options: str, cwd: Path | None = None) -> Process:
        """``nbd-migrate run`` on C."""
        return self.migrate("run", str(self.plan_file()), *options)

    def doomed(self, moment: str, *victims: str) -> Process:
        """The same, with SIGKILL to the victims at this moment."""
        argv = [sys.executable, "-m", "tests.support.doomed", str(self.plan_file()), moment]
        words = self.net.on("c", *argv, "+".join(victims), "SIGKILL")
        return Process(words, self.directory / "run.log", cwd=ROOT, env=self.environment)

    def connections(self) -> list[psutil.Process]:
        """The processes that keep the connections which are shared."""
        found = psutil.process_iter(["cmdline"])
        return [each for each in found if f"{self.runtime}" in " ".join(each.info["cmdline"] or [])
                and "[mux]" in " ".join(each.info["cmdline"])]  # fmt: skip

    def nothing_is_left_of_ssh(self) -> None:
        """No connection is there any more, nor a directory for one."""
        wait_until(lambda: not self.connections(), "the connections are closed", 60.0)
        wait_until(lambda: not list(self.runtime.iterdir()), "their directory is removed", 20.0)


@contextmanager
def apart(directory: Path, *lines: str, engine: str = "overlay") -> Iterator[ApartScene]:
    """Run the guest on A; ``lines`` are more ones of both sshd_configs."""
    if not SSHD.exists():
        pytest.skip("there is no sshd")
    with ExitStack() as stack:
        net = stack.enter_context(network())
        operator(directory)
        for host in ("a", "b"):
            stack.enter_context(server(directory, net, host, lines))
        runtime = stack.enter_context(short_directory())
        stage = ApartScene(directory, net, runtime, engine)
        stack.enter_context(running(stage, *net.on("a")))
        yield stage


def operator(directory: Path) -> None:
    """Make the operator's key, configuration and ssh, and the key of the hosts."""
    for name in ("host_key", "key"):
        check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", directory / name)
    (directory / "authorized").write_text((directory / "key.pub").read_text())
    public = (directory / "host_key.pub").read_text()
    (directory / "known_hosts").write_text("".join(f"{each} {public}" for each in ADDRESSES.values()))
    (directory / "ssh_config").write_text(
        f"UserKnownHostsFile {directory}/known_hosts\nGlobalKnownHostsFile none\nIdentitiesOnly yes\n"
        f"IdentityFile {directory}/key\nIdentityAgent none\nSendEnv {TAG}\n"
    )
    ssh = directory / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {directory}/ssh_config "$@"\n')
    ssh.chmod(0o755)


@contextmanager
def server(
    directory: Path, net: Network, host: str, lines: tuple[str, ...], address: str = ""
) -> Iterator[Process]:
    """Run the sshd of a host, at another address than the usual one if that is given."""
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = directory / f"sshd_config_{host}"
    settings = (
        f"ListenAddress {address or ADDRESSES[host]}",
        f"HostKey {directory}/host_key",
        f"AuthorizedKeysFile {directory}/authorized",
        *("PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no"),
        *("AllowTcpForwarding no", "AllowStreamLocalForwarding no", f"AcceptEnv {TAG}"),
        *lines,
    )
    config.write_text("\n".join(settings) + "\n")
    command = net.on(host, str(SSHD), "-D", "-e", "-f", str(config))
    with Process(command, directory / f"sshd_{host}.log") as running_server:
        running_server.wait_for_line("Server listening on")
        yield running_server
