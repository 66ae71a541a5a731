"""Other versions of this project as contenders: a checkout, run by this environment's interpreter."""

from __future__ import annotations

import contextlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import check

HERE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Version:
    """A checkout whose commands can be run."""

    name: str
    tree: Path

    def command(self, program: str) -> list[str]:
        """How to start ``nbdserve`` or ``nbd-overlay`` of this version."""
        project = tomllib.loads((self.tree / "pyproject.toml").read_text())["project"]
        module, _, function = project["scripts"][program].partition(":")
        # Before anything that is installed, and -P keeps the working directory out of it.
        code = f"import sys; sys.path.insert(0, {str(self.tree)!r}); sys.argv[0] = {program!r}; "
        code += f"from {module} import {function}; sys.exit({function}())"
        return [sys.executable, "-P", "-c", code]


@contextlib.contextmanager
def checked_out(what: str, directory: Path) -> Iterator[Version]:
    """Another version: the directory of a checkout, or a revision, which is checked out for the while."""
    if Path(what).is_dir():
        yield Version(what, Path(what).resolve())
        return
    revision = check("git", "-C", HERE, "rev-parse", "--short", f"{what}^{{commit}}").strip()
    tree = directory / revision
    check("git", "-C", HERE, "worktree", "add", "--detach", tree, revision)
    try:
        yield Version(revision, tree)
    finally:
        check("git", "-C", HERE, "worktree", "remove", "--force", tree)
