"""What a migration that was given up has made on B, and must not leave there."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import pasted
from recipes.migrate.state import State


def but(where: str, *left: str) -> str:
    """Return where the guest is, and what is not as it was before, each once."""
    return "; but ".join(dict.fromkeys([where, *left]))


def discarding(host: Host, state: State) -> list[str]:
    """Return the command for B that removes the image if it holds nothing: it may be the guest's."""
    return [host.tool("nbd-overlay"), "discard", state.plan.destination.image]


async def remove_made(host: Host, state: State, limit: float) -> list[str]:
    """Remove what was made on B; return a phrase for the operator when that failed.

    It does not raise: where the guest is does not depend on it.
    """
    if not state.made:
        return []
    image = state.plan.destination.image
    left = await _remove(host, discarding(host, state), limit)
    others = [path for path in state.made if path not in (image, f"{image}.map")]
    if others and not left:
        left += await _remove(host, ["rm", "-f", "--", *others], limit)
    return left


async def _remove(host: Host, argv: Sequence[str], limit: float) -> list[str]:
    try:
        await host.run(*argv, limit=limit)
    except MigrationError as error:
        command = pasted(host.argv(argv))
        return [f"what was made on {host.name} is still there ({error}): remove it: {command}"]
    return []
