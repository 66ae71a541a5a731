"""``nbdserve channel --ram``: the source's end of a migration over one connection, as a server of its own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
from collections.abc import Sequence

from nbdserve.channel.source import Source, SourceSettings
from nbdserve.cli.channel_options import (
    add_session,
    add_source,
    parser,
    require_distinct,
    source_settings,
    start_log,
    unix_path,
)
from nbdserve.cli.config import parse_export
from nbdserve.common import logs, program
from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import add_options, ownership
from nbdserve.common.program import Parser
from nbdserve.common.threads import promised
from nbdserve.connection.handshake import Terms
from nbdserve.connection.listeners import listen_unix
from nbdserve.connection.policy import Policy
from nbdserve.exports.export_options import ImageOptions
from nbdserve.exports.images import open_export
from nbdserve.exports.served_exports import Exports
from nbdserve.monitor import control
from nbdserve.service import daemonize
from nbdserve.service.entrance import Entrance
from nbdserve.service.pid_file import PidFile
from nbdserve.service.server import Server

_LOG = logging.getLogger("nbdserve")
_END = 10.0
"""Seconds in which the channel has taken leave when the server was stopped."""

_DESCRIPTION = """\
Be the source's end of a migration over one connection, as a server of its own.

It connects to the destination's end (nbdserve channel --listen), again whenever the connection is lost, and
serves the disks to it, read-only. QEMU migrates to the socket of --ram. It ends when the destination says
that it needs nothing more. Without --tls-certificates only the loopback, a Unix socket or ssh:// is
connected to.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command until the destination has everything, or a signal comes."""
    given = _parser().parse_args(arguments)
    settings = _settings(given)
    require_distinct(given, "token_file", "ram", "qmp", "pid_file")
    ram = unix_path(given.ram, "--ram")
    wanted = [parse_export(text, read_only=True) for text in given.export]
    images = ImageOptions(block_hashes=given.block_hashes)
    whose = ownership(given.socket_mode, given.socket_owner, "--socket-")
    start_log(given, logging.StreamHandler())
    program.allow_many_descriptors()
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(daemonize.background([])) if given.fork else None
        pid_file = stack.enter_context(PidFile(given.pid_file))
        exports = Exports()
        stack.callback(exports.close)
        for each in wanted:
            exports.add(open_export(each, images))
        policy = Policy(terms=Terms(structured_replies=not given.simple_replies))
        server = Server(exports, (), policy, expects_visitors=True)
        server.stop_on_signals()
        listener = listen_unix(ram, whose)
        stack.callback(listener.close)
        if given.qmp is not None:
            monitor = listen_unix(unix_path(given.qmp, "--qmp"))
            stack.callback(monitor.close)
            stack.enter_context(control.served(server, monitor, images))
        is_ready = False

        def connected() -> None:
            nonlocal is_ready
            if is_ready:
                return
            is_ready = True
            pid_file.publish()
            if background is not None:
                start_log(given, logs.system_log())
                background.ready()

        source = Source(settings, server.welcome, connected=connected)
        entrance = Entrance(listener, source.send)
        stack.callback(entrance.close)
        entrance.start()
        carried = promised("channel", source.run)
        carried.add_done_callback(lambda _: server.stop())
        server.run()
        source.stop()
        carried.result(_END)
    _LOG.info("channel: the end")
    return program.EXIT_DONE


def _settings(given: argparse.Namespace) -> SourceSettings:
    if not given.connect or given.token_file is None:
        raise UsageError("--ram needs --connect PLACE, where the destination is, and --token-file FILE")
    return source_settings(given, resume=True, patience=math.inf)


def _parser() -> Parser:
    made = parser(_DESCRIPTION)
    add = made.add_argument
    add_source(add, "the destination")
    add("--ram", metavar="unix:PATH", required=True, help="a Unix socket to which the source's QEMU migrates")
    add_options(add, "--socket-", "that socket")
    add(
        "--simple-replies",
        action="store_true",
        help="no structured replies, for a QEMU that copies",
    )
    add_session(add, certificates="ca-cert.pem, client-cert.pem and client-key.pem")
    add("--qmp", metavar="unix:PATH", help="live control, as of nbdserve: exports come and go")
    add("--fork", action="store_true", help="return when ready, and go on in the background")
    return made
