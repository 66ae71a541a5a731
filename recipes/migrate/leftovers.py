"""What a migration that was given up has made on B, and must not leave there."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import pasted


def but(where: str, *left: str) -> str:
    """Where the guest is, and what is not as it was before, each once."""
    return "; but ".join(dict.fromkeys([where, *left]))


async def remove(host: Host, argv: Sequence[str], limit: float) -> list[str]:
    """Run the command that removes it; return a phrase for the operator when that failed.

    It does not raise: where the guest is does not depend on it.
    """
    try:
        await host.run(*argv, limit=limit)
    except MigrationError as error:
        command = pasted(host.argv(argv))
        return [f"what was made on {host.name} is still there ({error}): remove it: {command}"]
    return []
