"""A real sshd on a port of the loopback, and an ssh that knows it, with keys and known hosts of their own."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TAG
from tests.support.processes import Process, check
from tests.support.servers import TcpAddress, free_tcp_address

SSHD = Path("/usr/sbin/sshd")


@dataclass(frozen=True)
class Sshd:
    """A server, the files of its client, and both its keys."""

    directory: Path
    address: TcpAddress

    @property
    def known_hosts(self) -> Path:
        """The client's list of known hosts."""
        return self.directory / "known_hosts"

    @property
    def key(self) -> Path:
        """The client's key."""
        return self.directory / "key"

    @property
    def options(self) -> tuple[str, ...]:
        """What the client is told, but for the destination."""
        return (
            *("-F", "none", "-p", str(self.address.port), "-i", str(self.key)),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "GlobalKnownHostsFile=none"),
            *("-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", f"SendEnv={TAG}"),
        )

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before a command."""
        return ("ssh", *self.options, f"{getpass.getuser()}@{self.address.host}")

    def know(self) -> None:
        """Let the client know the server's key."""
        public = (self.directory / "host_key.pub").read_text()
        self.known_hosts.write_text(f"[{self.address.host}]:{self.address.port} {public}")


@contextmanager
def sshd(directory: Path, *options: str) -> Iterator[Sshd]:
    """Run the server, with more lines of sshd_config, until the block ends. The client knows it."""
    if not SSHD.exists():
        pytest.skip("there is no sshd")
    made = Sshd(directory, free_tcp_address())
    for name in ("host_key", "key"):
        check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", directory / name)
    (directory / "authorized").write_text((directory / "key.pub").read_text())
    made.know()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    lines = (
        f"ListenAddress {made.address.host}",
        f"Port {made.address.port}",
        f"HostKey {directory / 'host_key'}",
        f"AuthorizedKeysFile {directory / 'authorized'}",
        "PidFile none",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        f"AcceptEnv {TAG}",
        *options,
    )
    config = directory / "sshd_config"
    config.write_text("\n".join(lines) + "\n")
    with Process([SSHD, "-D", "-e", "-f", config], directory / "sshd.log") as server:
        server.wait_for_line("Server listening on")
        yield made
