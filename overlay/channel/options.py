"""What the operator says of the channel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import PRIVATE, Ownership, add_options, ownership
from nbdserve.common.socket_paths import check_socket_path

_LISTEN = "listen:"


@dataclass(frozen=True)
class ChannelOptions:
    """Where the source connects, and what is done with what comes."""

    listen: str
    """``HOST:PORT`` or ``unix:PATH``."""
    incoming: str | None
    """The path at which this host's QEMU waits for the RAM; None: no RAM comes."""
    token_file: Path
    certificates: Path | None = None
    socket: str | None = None
    """The path at which others on this host reach the source's disks, too."""
    socket_owner: Ownership = PRIVATE


def add_channel(add: argparse._ActionsContainer) -> None:
    """Add the options to a parser."""
    option = add.add_argument
    option(
        "--channel",
        metavar="listen:PLACE",
        help="be the end of a migration over one connection, and listen at PLACE, HOST:PORT or unix:PATH, "
        "for the source's end (nbdserve channel), which has the backing migrate:NAME",
    )
    option("--incoming", metavar="unix:PATH", help="where this host's QEMU waits for the RAM (-incoming)")
    option("--token-file", type=Path, metavar="FILE", help="the secret that both ends of the channel share")
    option(
        "--tls-certificates",
        type=Path,
        metavar="DIR",
        help="the channel speaks TLS, by ca-cert.pem, server-cert.pem and server-key.pem",
    )
    option(
        "--channel-socket",
        metavar="PATH",
        help="a Unix socket at which others find the source's disks: the nbd-overlay of a guest's second "
        "disk, whose backing is nbd+unix:///NAME?socket=PATH (see nbd-overlay channel-done)",
    )
    add_options(option, "--channel-socket-", "that socket")


def read_channel(given: argparse.Namespace) -> ChannelOptions | None:
    """Return what was said of a channel, None where there is to be none; UsageError."""
    if given.channel is None:
        _require_nothing_else(given)
        return None
    if not given.channel.startswith(_LISTEN):
        raise UsageError(f"--channel {given.channel}: write listen:HOST:PORT or listen:unix:PATH")
    if given.token_file is None:
        raise UsageError("--channel: name the file of the secret that both ends share: --token-file FILE")
    whose = ownership(given.channel_socket_mode, given.channel_socket_owner, "--channel-socket-")
    if whose and given.channel_socket is None:
        raise UsageError(
            "--channel-socket-mode and --channel-socket-owner are for that socket: add --channel-socket"
        )
    return ChannelOptions(
        listen=given.channel.removeprefix(_LISTEN),
        incoming=None if given.incoming is None else _path(given.incoming),
        token_file=given.token_file,
        certificates=given.tls_certificates,
        socket=None
        if given.channel_socket is None
        else check_socket_path(given.channel_socket, "--channel-socket"),
        socket_owner=whose,
    )


def _require_nothing_else(given: argparse.Namespace) -> None:
    for option in ("incoming", "token_file", "tls_certificates", "channel_socket", "channel_socket_mode",
                   "channel_socket_owner"):  # fmt: skip
        if getattr(given, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for the channel: add --channel listen:PLACE")


def _path(text: str) -> str:
    if not text.startswith("unix:"):
        raise UsageError(f"--incoming {text}: write unix:PATH")
    return check_socket_path(text.removeprefix("unix:"), "--incoming")
