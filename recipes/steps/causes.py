"""Why a QEMU has ended in good order: QEMU's ShutdownCause, as its event SHUTDOWN tells it."""

from __future__ import annotations

WANTED = {"guest-shutdown", "guest-reset", "host-qmp-quit", "host-signal", "host-ui"}
"""Those after which somebody has what he wanted."""

_WORDS = {
    "guest-shutdown": "the guest has shut itself down on {host}",
    "guest-reset": "the guest has restarted, at which its QEMU on {host} ends",
    "guest-panic": "the guest has panicked on {host}",
    "host-qmp-quit": "{host}'s QEMU was told to quit",
    "host-signal": "{host}'s QEMU was ended by a signal",
    "host-ui": "{host}'s QEMU was closed",
    "host-error": "{host}'s QEMU has ended with an error of its host",
}
_ENDED = "{host}'s QEMU has ended"


def described(reason: str, host: str) -> str:
    """Return what has become of the guest that was on this host, for the operator."""
    return f"{_WORDS.get(reason, _ENDED).format(host=host)} ({reason})"
