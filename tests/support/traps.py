"""A directory in which Python would find something else than it should, if it looked there."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGES = ("nbd", "nbdserve", "overlay", "recipes", "qemu", "rich", "daemon", "psutil", "prometheus_client")


def lay(directory: Path) -> Path:
    """Make a module of every name that one of ours imports; each of them leaves its name in ``sprung``."""
    directory.mkdir()
    # With nothing but built-in functions, as every module that could be imported is another trap.
    trap = "open(__file__.rpartition('/')[0] + '/sprung', 'a').write(__name__ + '\\n')\n"
    for name in {*sys.stdlib_module_names, *PACKAGES}:
        (directory / f"{name}.py").write_text(trap)
    return directory


def sprung(directory: Path) -> str:
    """The modules that were taken from there."""
    trace = directory / "sprung"
    return trace.read_text() if trace.exists() else ""
