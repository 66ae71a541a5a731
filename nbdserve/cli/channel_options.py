"""The options that both ends of a channel have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from nbdserve.channel.terms import Limits
from nbdserve.common.errors import UsageError
from nbdserve.common.program import seconds
from nbdserve.common.socket_paths import check_socket_path

PROGRAM = "nbdserve channel"


def add_session(add: Callable[..., object], *, certificates: str) -> None:
    """Add the options that say who the other end is, and what is logged; ``certificates`` are those files."""
    add("--token-file", type=Path, metavar="FILE", help="the secret that both ends of this session share")
    add("--tls-certificates", type=Path, metavar="DIR", help=f"speak TLS, by {certificates}")
    add(
        "--silence",
        type=_silence,
        default=Limits.silence,
        metavar="S",
        help="after which another end that says nothing is lost (%(default)g)",
    )
    add("--log-format", choices=("text", "json"), default="text", help="lines of text, or objects")
    add("--pid-file", type=Path, metavar="FILE", help="holds the process id when ready")
    add("-v", "--verbose", action="store_true", help="log more")


def session_limits(given: argparse.Namespace) -> Limits:
    """Return what these options say of a session."""
    return Limits(silence=given.silence)


def unix_path(text: str, option: str) -> str:
    """Return the path in ``unix:PATH``; UsageError for anything else."""
    if not text.startswith("unix:"):
        raise UsageError(f"{option} {text}: write unix:PATH")
    return check_socket_path(text.removeprefix("unix:"), option)


def _silence(text: str) -> float:
    value = seconds(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of 1 to 3600 seconds")
    return value
