"""How a command gets to a host: behind a prefix of words, some of which may be ssh."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.hosts import ssh


@dataclass(frozen=True)
class Way:
    """The way to a host.

    name     of the host, "A" or "B", as messages call it
    shell    prefix of every command: nothing for this host, ``ip netns exec NAME``, ``ssh HOST`` ...
    options  more options for the prefix's ssh
    shared   those by which it shares a connection (recipes/connections/sharing.py)
    """

    name: str
    shell: tuple[str, ...] = ()
    options: tuple[str, ...] = field(default=(), kw_only=True)
    shared: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def remote(self) -> bool:
        """Tell whether ssh leads there: then our tools must be installed there."""
        return ssh.sessions(self.shell) > 0

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return the command with the prefix, quoted once for each remote shell that would split it again."""
        return [*ssh.with_options(self.shell, (*self.options, *self.shared)), *self._quoted(command)]

    def typed(self, command: Sequence[str]) -> list[str]:
        """Return the same as an operator types it, who is asked and waits as he likes."""
        return [*self.shell, *self._quoted(command)]

    def _quoted(self, command: Sequence[str]) -> Sequence[str]:
        for _ in range(ssh.sessions(self.shell)):
            command = [shlex.join(command)]
        return command
