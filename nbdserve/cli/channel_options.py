"""The options that the three forms of ``nbdserve channel`` share, and what is made of them."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from nbdserve.channel.dialling import Way
from nbdserve.channel.places import client_context, parse_place, read_token, require_secrecy
from nbdserve.channel.source import SourceSettings
from nbdserve.channel.terms import Limits
from nbdserve.common import logs
from nbdserve.common.errors import UsageError
from nbdserve.common.program import Parser, RawHelpFormatter, filled, seconds
from nbdserve.common.socket_paths import check_socket_path

PROGRAM = "nbdserve channel"


def parser(description: str) -> Parser:
    """Return a parser without options."""
    return Parser(
        prog=PROGRAM,
        description=description,
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
        formatter_class=RawHelpFormatter,
    )


def add_source(add: Callable[..., object], destination: str) -> None:
    """Add the options that say where ``destination`` is, and which disks it gets."""
    add(
        "--connect",
        action="append",
        default=[],
        metavar="PLACE",
        help=f"HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]/PATH, where {destination} listens; may be "
        "repeated: other ways to it, which are tried in turn",
    )
    add(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FILE[,format=F][,offset=N][,size=N]",
        help="a disk, as for nbdserve, or the nbd:// URI of another server's export; may be repeated",
    )
    add("--block-hashes", action="store_true", help="tell hashes of blocks to nbd-overlay serve --seed")
    add("--tls-hostname", type=filled, metavar="NAME", help="whose certificate it must be (default: HOST's)")
    add("--ssh", type=_command, default="ssh", metavar="COMMAND", help="that leads to ssh:// (default: ssh)")
    add(
        "--remote",
        type=filled,
        default="nbdserve",
        metavar="COMMAND",
        help="what nbdserve is called on the host of ssh:// (default: nbdserve)",
    )


def add_session(
    add: Callable[..., object], *, certificates: str, pid: str = "the process id when ready"
) -> None:
    """Add the options that say who the other end is, and what is logged.

    ``certificates`` are those files, and ``pid`` is what the pid file holds.
    """
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
    add("--pid-file", type=Path, metavar="FILE", help=f"holds {pid}")
    add("-v", "--verbose", action="store_true", help="log more")


def source_settings(given: argparse.Namespace, *, resume: bool, patience: float) -> SourceSettings:
    """Return what these options say of a source; ``resume`` and ``patience`` (seconds) as in SourceSettings.

    Raises UsageError.
    """
    if given.tls_hostname is not None and given.tls_certificates is None:
        raise UsageError("--tls-hostname has no effect without --tls-certificates")
    places = [parse_place(text, "--connect") for text in given.connect]
    tls = None if given.tls_certificates is None else client_context(given.tls_certificates)
    for place in places:
        require_secrecy(place, "--connect", encrypted=tls is not None)
    return SourceSettings(
        ways=[Way(place, tls, given.tls_hostname, given.ssh, given.remote) for place in places],
        token=read_token(given.token_file),
        resume=resume,
        patience=patience,
        limits=session_limits(given),
    )


def start_log(given: argparse.Namespace, handler: logging.Handler) -> None:
    """Log to this handler from now on, as the options say."""
    logs.start("nbdserve", handler, as_json=given.log_format == "json", verbose=given.verbose)


def session_limits(given: argparse.Namespace) -> Limits:
    """Return what these options say of a session."""
    return Limits(silence=given.silence)


def unix_path(text: str, option: str) -> str:
    """Return the path in ``unix:PATH``; UsageError for anything else."""
    if not text.startswith("unix:"):
        raise UsageError(f"{option} {text}: write unix:PATH")
    return check_socket_path(text.removeprefix("unix:"), option)


def require_distinct(given: argparse.Namespace, *names: str) -> None:
    """UsageError where two of these options, as the namespace calls them, name the same file."""
    seen = dict[str, str]()
    for name in names:
        value = getattr(given, name)
        path = None if value is None else str(value).removeprefix("unix:")
        if path is None or (name == "listen" and not str(value).startswith("unix:")):
            continue
        option, real = f"--{name.replace('_', '-')}", os.path.realpath(path)
        if real in seen:
            raise UsageError(f"{option} {value}: it is the same file as {seen[real]}")
        seen[real] = option


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("it is empty; give it a value, or leave it out")
    return text


def _silence(text: str) -> float:
    value = seconds(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of 1 to 3600 seconds")
    return value
