"""libnbd's Python binding, which no package index has: only a distribution's package, for its own Python."""

from __future__ import annotations

from typing import Any

from nbdserve.common.errors import OperatorError

_WHERE = (
    "install python3-libnbd (Debian, Ubuntu, Fedora) or libnbd (Arch), and use the system's own Python; "
    "a virtual environment sees it if it was made by /usr/bin/python3 -m venv --system-site-packages"
)


def load() -> Any:
    """Return the module ``nbd``; OperatorError, with what to install, when it is not there."""
    try:
        import nbd
    except ImportError as error:
        raise OperatorError(f"libnbd's Python module is not here ({error}): {_WHERE}") from error
    if not hasattr(nbd, "NBD"):
        place = getattr(nbd, "__file__", None) or "somewhere"
        raise OperatorError(
            f"the Python module nbd in {place} is another package, not libnbd's: "
            f"remove it (pip uninstall nbd); {_WHERE}"
        )
    return nbd


nbd = load()
