"""Commands as a table of functions, and their arguments checked against the functions' own signatures."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

Handler = Callable[..., object]
"""Carries out a command and returns what can be told as JSON, None for an empty object; or a Future of that.

Its keyword parameters are the command's arguments: ``node_name`` for ``node-name``, ``type_`` for ``type``.
Their types are str, bool, int, dict or list, or one of these ``| None``; a default makes one optional. To
refuse it raises CommandError, OperatorError or OSError.
"""

_KINDS: dict[object, str] = {str: "string", bool: "boolean", int: "integer", dict: "object", list: "array"}


_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class CommandError(Exception):
    """A command that is refused. ``kind`` is one of QEMU's error classes."""

    def __init__(self, description: str, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.kind = kind


class Command:
    """A handler that can be called with the arguments of a message."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        hints = get_type_hints(handler)
        self._parameters = {
            name.rstrip("_").replace("_", "-"): (
                name,
                _plain(hints[name]),
                parameter.default is parameter.empty,
            )
            for name, parameter in inspect.signature(handler).parameters.items()
        }

    def run(self, arguments: Mapping[str, object]) -> object:
        """Carry it out; CommandError when an argument is missing, unknown or of the wrong type."""
        for name in arguments:
            if name not in self._parameters:
                raise CommandError(f"Parameter '{name}' is unexpected")
        passed: dict[str, object] = {}
        for name, (keyword, kind, required) in self._parameters.items():
            if name in arguments:
                passed[keyword] = _checked(name, arguments[name], kind)
            elif required:
                raise CommandError(f"Parameter '{name}' is missing")
        return self._handler(**passed)


def _plain(hint: Any) -> Any:
    """The type without ``| None``, and without what a list is of."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    hint = get_origin(hint) or hint
    assert hint in _KINDS, f"{hint} is no type of a command's argument"
    return hint


def _checked(name: str, value: object, kind: Any) -> object:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CommandError(f"Invalid parameter type for '{name}', expected: {_KINDS[kind]}")
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise CommandError(f"Invalid parameter '{name}': it has a NUL or half a surrogate pair in it")
    return value
