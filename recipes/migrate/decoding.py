"""Values of our own types out of JSON, each checked: what is not what we write is refused, not believed."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decoded(kind: type[T], value: object) -> T:
    """Make a value of a type of what JSON has for it. Raises ValueError where it has anything else.

    The type is a dataclass, an enumeration, a tuple of any length, an optional one, str, bool, int or float.
    """
    return _decoded(kind, value)  # type: ignore[no-any-return]


def _decoded(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_decoded(get_args(kind)[0], each) for each in _of(list, value))
    if get_origin(kind) is UnionType:
        [inner] = [each for each in get_args(kind) if each is not type(None)]
        return None if value is None else _decoded(inner, value)
    if dataclasses.is_dataclass(kind):
        return _record(kind, _of(dict, value))
    if issubclass(kind, Enum):
        return kind(value)
    if kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is no number")
        return float(value)
    return _of(kind, value)


def _record(kind: Any, given: dict[str, Any]) -> Any:
    hints, wanted = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    # What has a default may be younger than what was written.
    missing = {name for name in wanted.keys() - given.keys() if _is_required(wanted[name])}
    if wrong := missing | given.keys() - wanted.keys():
        raise ValueError(f"{', '.join(sorted(wrong))} of {kind.__name__}")
    return kind(**{name: _decoded(hints[name], each) for name, each in given.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _of(kind: type[T], value: object) -> T:
    # A bool is an int, too.
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value
