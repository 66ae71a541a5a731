"""ssh as the way to a host: its options, where a shell reads our words again, and what its complaints mean.

Nothing is started on a host here: calls.py runs a short command there, processes/children.py what lasts,
under a supervisor at the other end (processes/supervisor.py).

Nobody is ever asked anything on a terminal: where ssh would, it fails with a line that says what to do.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from recipes.hosts.process_group import end_group
from recipes.hosts.spawn import spawn

_WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
"""The letters of ssh's options that take a value."""

_LOOK = 5.0
"""Seconds in which ssh must say what its options are, which needs no network."""

_UNSET = {"batchmode": "no", "connecttimeout": "none", "serveraliveinterval": "0"}
"""What ``ssh -G`` says of the options that we would add where nobody has set them."""


def sessions(prefix: Sequence[str]) -> int:
    """Return how many shells read a command behind this prefix: one for each ssh in it."""
    return sum(PurePath(word).name == "ssh" for word in prefix[:-1])


def with_options(prefix: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the prefix with more options for its first ssh, which win over none of those that it has."""
    words = list(prefix)
    at = _end_of_options(words)
    return words if at is None else [*words[:at], *options, *words[at:]]


async def missing_options(prefix: Sequence[str], limit: float) -> tuple[str, ...]:
    """Return the options without which ssh might ask something, or wait too long for a host.

    That is more than ``limit`` seconds. Only what is set neither in the prefix nor in ssh's configuration is
    returned; nothing where there is no OpenSSH.
    """
    at = _end_of_options(list(prefix))
    if at is None:
        return ()
    first = next(number for number, word in enumerate(prefix) if PurePath(word).name == "ssh")
    known = await _configuration([*prefix[: first + 1], "-G", *prefix[first + 1 : at]])
    wanted = {
        "batchmode": "BatchMode=yes",
        "connecttimeout": f"ConnectTimeout={max(1, int(limit))}",
        "serveraliveinterval": "ServerAliveInterval=5",
    }
    missing = [option for key, option in wanted.items() if known.get(key) == _UNSET[key]]
    return tuple(word for option in missing for word in ("-o", option))


def _end_of_options(words: list[str]) -> int | None:
    """Return where the command begins behind the first ssh's options and destination.

    It is None where there is no ssh.
    """
    names = [PurePath(word).name for word in words[:-1]]
    if "ssh" not in names:
        return None
    at, has_destination = names.index("ssh") + 1, False
    while at < len(words):
        word = words[at]
        if word.startswith("-") and word != "-":
            letters = word[1:]
            valued = next((number for number, letter in enumerate(letters) if letter in _WITH_VALUE), None)
            # The value is what follows the letter, or else the next word.
            at += 1 + (valued == len(letters) - 1)
        elif has_destination:
            break
        else:
            has_destination = True
            at += 1
    return min(at, len(words)) if has_destination else None


async def _configuration(argv: Sequence[str]) -> Mapping[str, str]:
    """Return what ``ssh -G`` prints, by key; nothing when that fails."""
    try:
        process = await spawn(
            argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return {}
    try:
        async with asyncio.timeout(_LOOK):
            output, _ = await process.communicate()
    except TimeoutError:
        await end_group(process)
        return {}
    lines = (line.partition(" ") for line in output.decode(errors="replace").lower().splitlines())
    return {key: value for key, _, value in lines} if process.returncode == 0 else {}


_REMEDIES = (
    (r"Host key for .* has changed", "if that host was really installed anew, remove its old key{removal}"),
    (r"Host key verification failed", "connect once by hand and confirm its key: {by_hand}"),
    (
        r"Permission denied|Too many authentication failures",
        "nobody can be asked for a password here: see that a key of yours is accepted there (ssh-copy-id)",
    ),
    (r"Could not resolve hostname", "correct the host's name"),
    (r"Connection refused", "see that sshd runs there, and on this port"),
    (r"timed out|No route to host|unreachable|not responding", "see that the host is up and can be reached"),
    (r"sudo: .*password", "nobody can be asked for one here: allow the command without (NOPASSWD)"),
    (r"[Cc]onnection (closed|reset) by|closed by remote host", "see what the log of sshd there says"),
)
"""What to do, by what was said; the first that fits counts, wherever the line is."""


def explain(said: str, prefix: Sequence[str]) -> str:
    """Return the line that matters of what was said on the way to a host, and what can be done about it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern, remedy in _REMEDIES:
        line = next((line for line in reversed(lines) if re.search(pattern, line)), None)
        if line is not None:
            removal = next((f": {each}" for each in lines if each.startswith("ssh-keygen ")), "")
            by_hand = shlex.join([*prefix, "true"])
            return f"{line.rstrip('.')}; {remedy.format(removal=removal, by_hand=by_hand)}"
    return lines[-1] if lines else ""
