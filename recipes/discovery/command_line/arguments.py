"""The argument of one of QEMU's options, ``key=value,key=value`` or JSON: a mapping of dotted keys. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nbdserve.common.errors import UsageError

_SWITCHED_OFF = ("nowait", "noserver", "notelnet", "nomux", "noipv4", "noipv6")
"""What stands alone and means ``off`` for the key behind ``no``, in the older way of writing."""


@dataclass(frozen=True)
class Arguments:
    """What an option says.

    values   by key; what is nested has its path with dots (``file.filename``), and numbers for lists
    implied  the key of which the first value may stand alone, as ``driver`` with -device
    is_json  whether it was written as JSON, and is again
    """

    values: Mapping[str, Any]
    implied: str = ""
    is_json: bool = False

    def text(self, key: str, default: str = "") -> str:
        """Return a value as QEMU's own syntax has it: ``on`` for true."""
        value = self.values.get(key, default)
        return ("on" if value else "off") if isinstance(value, bool) else str(value)

    def is_on(self, key: str, default: str = "off") -> bool:
        """Tell whether a switch is on."""
        return self.text(key, default) in ("on", "yes", "true", "y")

    def having(self, **values: Any) -> Arguments:
        """Return the same with other values; ``_`` in a keyword stands for ``-``."""
        changed = {key.replace("_", "-"): value for key, value in values.items()}
        return Arguments({**self.values, **changed}, self.implied, self.is_json)

    def without(self, *keys: str) -> Arguments:
        """Return the same without these keys, and what is nested in them."""

        def goes(key: str) -> bool:
            return any(key == each or key.startswith(f"{each}.") for each in keys)

        kept = {key: value for key, value in self.values.items() if not goes(key)}
        return Arguments(kept, self.implied, self.is_json)

    def __str__(self) -> str:
        if self.is_json:
            return json.dumps(nested(self.values))
        first = [quoted(self.text(self.implied))] if self.implied in self.values else []
        rest = [f"{key}={quoted(self.text(key))}" for key in self.values if key != self.implied]
        return ",".join([*first, *rest])


def parse(text: str, implied: str = "") -> Arguments:
    """Take an option's argument apart; raises UsageError for JSON that is none."""
    if text.startswith("{"):
        try:
            return Arguments(dict(flat(json.loads(text))), implied, is_json=True)
        except ValueError as error:
            raise UsageError(f"{text!r} is no JSON: {error}") from error
    values: dict[str, Any] = {}
    for number, word in enumerate(split(text)):
        key, equals, value = word.partition("=")
        if equals:
            values[key] = value
        elif number == 0 and implied and word:
            values[implied] = word
        elif word in _SWITCHED_OFF:
            values[word.removeprefix("no")] = "off"
        elif word:
            values[word] = "on"
    return Arguments(values, implied)


def split(text: str) -> list[str]:
    """Split at single commas; two of them are one that belongs to a value."""
    words, at = [""], 0
    while at < len(text):
        if text[at] == "," and text[at + 1 : at + 2] != ",":
            words.append("")
        else:
            words[-1] += text[at]
            at += text[at] == ","
        at += 1
    return words


def quoted(text: str) -> str:
    """Return a value as it stands in QEMU's own syntax."""
    return text.replace(",", ",,")


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested mappings and lists, with its path."""
    if isinstance(value, dict | list) and (value or not path):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from flat(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def nested(values: Mapping[str, Any]) -> Any:
    """Undo ``flat``: where all keys are numbers, there was a list."""
    groups: dict[str, Any] = {}
    for key, value in values.items():
        first, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = value
        else:
            groups[first] = value
    made = {
        key: nested(value) if any(name.startswith(f"{key}.") for name in values) else value
        for key, value in groups.items()
    }
    if made and all(key.isdecimal() for key in made):
        return [made[key] for key in sorted(made, key=int)]
    return made
