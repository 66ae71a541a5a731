"""``nbdserve channel --ram``: the source's end of a migration over one connection, as a server of its own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import resource
from collections.abc import Sequence

from nbdserve.channel.dialling import Way
from nbdserve.channel.places import client_context, parse_place, read_token, require_secrecy
from nbdserve.channel.source import Source, SourceSettings
from nbdserve.cli.channel_options import PROGRAM, add_session, session_limits, unix_path
from nbdserve.cli.config import parse_export
from nbdserve.common import logs, program
from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import ownership
from nbdserve.common.program import Parser, RawHelpFormatter, filled
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
    ram = unix_path(given.ram, "--ram")
    wanted = [parse_export(text, read_only=True) for text in given.export]
    images = ImageOptions(block_hashes=given.block_hashes)
    whose = ownership(given.socket_mode, given.socket_owner, "--socket-")
    _start_log(given, logging.StreamHandler())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
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
                _start_log(given, logs.system_log())
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
    if given.tls_hostname is not None and given.tls_certificates is None:
        raise UsageError("--tls-hostname has no effect without --tls-certificates")
    places = [parse_place(text, "--connect") for text in given.connect]
    tls = None if given.tls_certificates is None else client_context(given.tls_certificates)
    for place in places:
        require_secrecy(place, "--connect", encrypted=tls is not None)
    return SourceSettings(
        ways=[Way(place, tls, given.tls_hostname, given.ssh, given.remote) for place in places],
        token=read_token(given.token_file),
        resume=True,
        patience=math.inf,
        limits=session_limits(given),
    )


def _start_log(given: argparse.Namespace, handler: logging.Handler) -> None:
    logs.start("nbdserve", handler, as_json=given.log_format == "json", verbose=given.verbose)


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage.",
        formatter_class=RawHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--connect",
        action="append",
        default=[],
        metavar="PLACE",
        help="HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]/PATH, where the destination listens; may "
        "be repeated: other ways to it, which are tried in turn",
    )
    add("--ram", metavar="unix:PATH", required=True, help="a Unix socket to which the source's QEMU migrates")
    add("--socket-owner", metavar="USER[:GROUP]", help="whose that is")
    add("--socket-mode", metavar="MODE", help="who may use it (default: 0600)")
    add(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FILE[,format=F][,offset=N][,size=N]",
        help="a disk, as for nbdserve, or the nbd:// URI of another server's export; may be repeated",
    )
    add("--block-hashes", action="store_true", help="tell hashes of blocks to nbd-overlay")
    add(
        "--simple-replies",
        action="store_true",
        help="no structured replies, for a QEMU that copies",
    )
    add_session(add, certificates="ca-cert.pem, client-cert.pem and client-key.pem")
    add("--tls-hostname", type=filled, metavar="NAME", help="whose certificate it must be (default: HOST's)")
    add("--ssh", type=filled, default="ssh", metavar="COMMAND", help="that leads to ssh:// (default: ssh)")
    add(
        "--remote",
        type=filled,
        default="nbdserve",
        metavar="COMMAND",
        help="what nbdserve is called on the host of ssh:// (default: nbdserve)",
    )
    add("--qmp", metavar="unix:PATH", help="live control, as of nbdserve: exports come and go")
    add("--fork", action="store_true", help="return when ready, and go on in the background")
    return parser
