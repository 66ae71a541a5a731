"""What ``-readconfig`` reads: groups of keys, each of which is an option. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.arguments import Arguments
from recipes.discovery.command_line.options import IMPLIED, KEYED, Option

GROUPS = {"boot-opts": "boot", "memory": "m", "smp-opts": "smp", "option_rom": "option-rom"}
"""Groups whose option has another name."""

_GROUP = re.compile(r'\[([A-Za-z0-9_-]+)(?: "([^"]+)")?\]')
_VALUE = re.compile(r'([A-Za-z0-9_.-]+) = "([^"]*)"')


def parse(text: str, path: str) -> list[Option]:
    """Return the options that such a file stands for, in their order.

    Raises UsageError, with the file's line, for what is not understood.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if match := _GROUP.fullmatch(line):
            name = GROUPS.get(match[1], match[1])
            if name not in KEYED:
                raise UsageError(f"{path}:{number}: the group [{match[1]}] is not known here")
            found.append((name, {}))
            if match[2]:
                found[-1][1]["id"] = match[2]
        elif (match := _VALUE.fullmatch(line)) and found and match[1] not in found[-1][1]:
            found[-1][1][match[1]] = match[2]
        else:
            raise UsageError(f"{path}:{number}: {line!r} is not understood")
    return list(_options(found))


def _options(groups: list[tuple[str, dict[str, str]]]) -> Iterator[Option]:
    for name, values in groups:
        implied = IMPLIED.get(name, "")
        yield Option(name, str(Arguments(values, implied if implied in values else "")))
