"""TLS for the benchmark: a server's identity, and how fio's client comes to trust it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.tls import Identities

NOBODY = 65534


@dataclass(frozen=True)
class Trust:
    """A directory with a server's certificate, and a home directory in which libnbd finds who signed it."""

    identity: Path
    home: Path

    @classmethod
    def create(cls, directory: Path) -> Trust:
        """Make both in a new directory, which others may look into."""
        directory.mkdir()
        identities = Identities.create(directory)
        home = directory / "home"
        trusted = home / ".pki" / "libnbd"
        trusted.mkdir(parents=True)
        # nbd-server wants a certificate of its clients.
        for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
            shutil.copyfile(identities.client / name, trusted / name)
        for path in (directory, home, home / ".pki", trusted):
            path.chmod(0o755)
        return cls(identities.server, home)

    def client(self) -> list[str]:
        """What stands before a command so that libnbd in it trusts the server.

        For root it looks in /etc only, which is nobody's to change for a benchmark.
        """
        other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        return [*(other if os.geteuid() == 0 else []), "env", f"HOME={self.home}"]
