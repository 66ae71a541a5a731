"""How disk and RAM get from A to B."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.errors import UsageError
from recipes.connections.address import check_listening

TLS, PLAIN, SSH, SINGLE = "tls", "plain", "ssh", "single"
KINDS = (TLS, PLAIN, SSH, SINGLE)

BETWEEN_SOCKETS = frozenset({SSH, SINGLE})
"""Those in which all that the two QEMUs, nbd-overlay and A's disks are reached at are Unix sockets."""

FORMER = "tcp"
"""What ``plain`` was called before there was anything else."""


@dataclass(frozen=True)
class Channel:
    """What the connections between the hosts are, where they are not Unix sockets, which no network sees.

    tls     both over TLS, with certificates that are made for this migration; both ends are verified
    plain   as they are, for whoever is on the network to read; A's server serves B's address alone
    ssh     both through the operator's ssh, between Unix sockets; no port is listened at but that of sshd
    single  both in one connection, which A makes to B, over TLS as above

    ``address`` is where B listens for that one connection; empty: it is destination.migration that says so.
    """

    kind: str = TLS
    address: str = ""

    def check(self) -> None:
        """Raise UsageError unless there is such a kind, with what belongs to it."""
        if self.kind == FORMER:
            raise UsageError(
                f"channel.kind: {FORMER!r} is called {PLAIN!r} now, and all on the network can read it then; "
                "leave it out, and disk and RAM go over TLS"
            )
        if self.kind not in KINDS:
            words = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
            raise UsageError(f"channel.kind: {self.kind!r} is none: write {words}")
        if self.address and self.kind != SINGLE:
            raise UsageError(
                f"channel.address: this is for channel.kind = {SINGLE!r}; with {self.kind!r} leave it out"
            )
        if self.address:
            check_listening("channel.address", self.address)
