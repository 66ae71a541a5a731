"""Commands as an operator can paste them: in one line, for bash, whatever is in their words."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence

_UNSAFE_IN_A_LINE = re.compile(r"[^\x20-\x7e\xa1-\ud7ff\uf900-\uffef\U00010000-\U0010fffd]|  |^ | $")
"""What would break the line, could not be seen, or is lost where a message's spaces are put in order."""


def pasted(words: Sequence[str]) -> str:
    """Return the command as one line for bash."""
    return " ".join(map(quoted, words))


def listed(words: Iterable[str]) -> str:
    """Return names in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def quoted(word: str) -> str:
    """Return one word, quoted where it must be; with bash's ``$'...'`` where it has control characters."""
    if not _UNSAFE_IN_A_LINE.search(word):
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(char: str) -> str:
    if char in "'\\":
        return f"\\{char}"
    if char.isascii() and char.isprintable() and char != " ":
        return char
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))


def on_one_line(script: str) -> str:
    """Return a script for a shell as one line, as messages show what was run; its commands end with ``;``."""
    return " ".join(script.split("\n"))
