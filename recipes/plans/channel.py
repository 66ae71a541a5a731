"""How disk and RAM get from A to B."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.errors import UsageError

TLS, PLAIN, SSH = "tls", "plain", "ssh"
KINDS = (TLS, PLAIN, SSH)

FORMER = "tcp"
"""What ``plain`` was called before there was anything else."""


@dataclass(frozen=True)
class Channel:
    """What the connections between the hosts are, where they are not Unix sockets, which no network sees.

    tls    both over TLS, with certificates that are made for this migration; both ends are verified
    plain  as they are, for whoever is on the network to read; A's server serves B's address alone
    ssh    both through the operator's ssh, between Unix sockets; no port is listened at but that of sshd
    """

    kind: str = TLS

    def check(self) -> None:
        """Raise UsageError unless there is such a kind."""
        if self.kind == FORMER:
            raise UsageError(
                f"channel.kind: {FORMER!r} is called {PLAIN!r} now, and all on the network can read it then; "
                "leave it out, and disk and RAM go over TLS"
            )
        if self.kind not in KINDS:
            raise UsageError(f"channel.kind: {self.kind!r} is none: write {', '.join(KINDS[:-1])} or {SSH}")
