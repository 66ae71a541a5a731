"""What is called otherwise on B, as A's QEMU has it already or something else does. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping

_MARK = "moved"


def names(paths: Iterable[str], taken: Collection[str]) -> Mapping[str, str]:
    """Return B's name of each path that is taken there; the others keep theirs.

    ``taken`` are paths that are there already.
    """
    used = set(taken)
    found = {}
    for path in dict.fromkeys(paths):
        if path in taken:
            found[path] = next(each for each in candidates(path) if each not in used)
            used.add(found[path])
    return found


def candidates(path: str) -> Iterable[str]:
    """Yield other names for a path: ``a.qmp`` is ``a.moved.qmp``, and after the way back ``a.qmp`` again."""
    directory, name = posixpath.split(path)
    stem, dot, ending = name.rpartition(".")
    if not stem:
        stem, dot, ending = name, "", ""
    plain = re.sub(rf"\.{_MARK}[0-9]*$", "", stem)
    if plain != stem:
        yield posixpath.join(directory, f"{plain}{dot}{ending}")
    elif ending == _MARK:
        yield posixpath.join(directory, stem)
    for number in range(1, 1000):
        count = "" if number == 1 else str(number)
        yield posixpath.join(directory, f"{plain}.{_MARK}{count}{dot}{ending}")
