"""The subcommand ``nbdserve channel``: the source's end of a migration over one connection."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from queue import SimpleQueue

from nbdserve.channel.dialling import Way
from nbdserve.channel.places import client_context, parse_place, read_token, require_secrecy
from nbdserve.channel.relay import relay
from nbdserve.channel.source import RamPipes, Source, SourceSettings
from nbdserve.channel.terms import Limits
from nbdserve.channel.worker import Lifeline, require_pipes, split
from nbdserve.cli.config import parse_export
from nbdserve.common import logs, program
from nbdserve.common.errors import OperatorError, UsageError, reason_of
from nbdserve.common.program import Parser, RawHelpFormatter, filled, seconds
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.threads import Thread, promised
from nbdserve.connection.policy import Policy
from nbdserve.exports.export_options import ExportOptions, ImageOptions
from nbdserve.exports.images import open_export
from nbdserve.exports.served_exports import Exports
from nbdserve.service.pid_file import PidFile
from nbdserve.service.server import Server

PROGRAM = "nbdserve channel"
_LOG = logging.getLogger("nbdserve")
_DAY = 86400.0
_LOOK = 0.5
"""Seconds within which a signal is noticed."""
_END = 12.0
"""Seconds in which the server ends."""

_DESCRIPTION = """\
Carry a migration over one connection: the guest's RAM, and the disks that are still to be copied.

QEMU itself starts this, on the source, and waits only until the RAM has gone over:

    migrate "exec:nbdserve channel --connect HOST:PORT --export NAME=FILE --token-file FILE ..."

What it leaves behind serves the disks, read-only, until nbd-overlay serve --channel, on the destination,
needs them no more. Without --tls-certificates only the loopback, a Unix socket or ssh:// is connected to.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Raises OperatorError where it cannot begin."""
    options = {word.partition("=")[0] for word in arguments}
    if "--listen" in options:
        from nbdserve.cli import channel_listening

        return channel_listening.main(arguments)
    if "--ram" in options:
        from nbdserve.cli import channel_serving

        return channel_serving.main(arguments)
    given = _parser().parse_args(arguments)
    if given.relay is not None:
        relay(check_socket_path(given.relay, "--relay"))
        return program.EXIT_DONE
    settings = _settings(given)
    exports = [parse_export(text, read_only=True) for text in given.export]
    # Before QEMU is let go, so that it is told of what is missing.
    log = _open_log(given)
    if given.resume:
        return _carry(given, settings, exports, None)
    require_pipes()
    lifeline = split(PROGRAM)
    _leave_standard_error(log)
    try:
        return _carry(given, settings, exports, lifeline)
    except (OperatorError, OSError) as error:
        reason = str(error) if isinstance(error, OperatorError) else _reason(error)
        _LOG.error("%s", reason)
        lifeline.over(False, reason)
        return program.EXIT_FAILED


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
        help="HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]/PATH, where nbd-overlay serve --channel "
        "listens; may be repeated: other ways to it, which are tried in turn",
    )
    add(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FILE[,format=F][,offset=N][,size=N]",
        help="a disk, as for nbdserve, or the nbd:// URI of another server's export; may be repeated",
    )
    add("--block-hashes", action="store_true", help="tell hashes of blocks to nbd-overlay serve --seed")
    add("--token-file", type=Path, metavar="FILE", help="the secret that both ends of this session share")
    add(
        "--tls-certificates",
        type=Path,
        metavar="DIR",
        help="speak TLS, by ca-cert.pem, client-cert.pem and client-key.pem",
    )
    add("--tls-hostname", type=filled, metavar="NAME", help="whose certificate it must be (default: HOST's)")
    add("--ssh", type=filled, default="ssh", metavar="COMMAND", help="that leads to ssh:// (default: ssh)")
    add(
        "--remote",
        type=filled,
        default="nbdserve",
        metavar="COMMAND",
        help="what nbdserve is called on the host of ssh:// (default: nbdserve)",
    )
    add("--resume", action="store_true", help="go on with a session whose source end has ended; stays here")
    add(
        "--reconnect-timeout",
        type=seconds,
        default=_DAY,
        metavar="S",
        help="for how long a destination that is lost is looked for (%(default)g)",
    )
    add(
        "--silence",
        type=_silence,
        default=Limits.silence,
        metavar="S",
        help="after which a destination that says nothing is lost (%(default)g)",
    )
    add(
        "--log",
        type=Path,
        metavar="FILE",
        help="where to log (default: the system log)",
    )
    add("--log-format", choices=("text", "json"), default="text", help="lines of text, or objects")
    add("--pid-file", type=Path, metavar="FILE", help="holds the process id of what is left behind")
    add("-v", "--verbose", action="store_true", help="log more")
    add("--relay", metavar="PATH", help="only pass standard input and output on to a socket, as ssh:// needs")
    return parser


def _silence(text: str) -> float:
    value = seconds(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of 1 to 3600 seconds")
    return value


def _settings(given: argparse.Namespace) -> SourceSettings:
    if not given.connect:
        raise UsageError("say where the destination is: --connect PLACE")
    if given.token_file is None:
        raise UsageError("name the file of the session's secret: --token-file FILE")
    if given.tls_hostname is not None and given.tls_certificates is None:
        raise UsageError("--tls-hostname has no effect without --tls-certificates")
    places = [parse_place(text, "--connect") for text in given.connect]
    tls = None if given.tls_certificates is None else client_context(given.tls_certificates)
    for place in places:
        require_secrecy(place, "--connect", encrypted=tls is not None)
    return SourceSettings(
        ways=[Way(place, tls, given.tls_hostname, given.ssh, given.remote) for place in places],
        token=read_token(given.token_file),
        resume=given.resume,
        patience=given.reconnect_timeout,
        limits=Limits(silence=given.silence),
    )


def _carry(
    given: argparse.Namespace,
    settings: SourceSettings,
    wanted: Sequence[ExportOptions],
    lifeline: Lifeline | None,
) -> int:
    """Serve the disks and carry the channel until it is done; the exit code."""
    with contextlib.ExitStack() as stack:
        pid_file = stack.enter_context(PidFile(given.pid_file))
        exports = Exports()
        stack.callback(exports.close)
        for each in wanted:
            exports.add(open_export(each, ImageOptions(block_hashes=given.block_hashes)))
        server = Server(exports, (), Policy(), expects_visitors=True)
        serving = Thread(server.run, "server")
        serving.start()
        stack.callback(serving.join, _END)
        stack.callback(server.stop)
        ram = None if lifeline is None else RamPipes(lifeline.reader, lifeline.writer, lifeline.over)
        source = Source(settings, server.welcome, ram)
        stopped = False
        # Not in the handler: one that interrupts another would wait for its locks for ever.
        signals = SimpleQueue[None]()

        def stop() -> None:
            nonlocal stopped
            signals.get()
            stopped = True
            source.stop()

        Thread(stop, "signals").start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: signals.put(None))
        pid_file.publish()
        carried = promised("channel", source.run)
        # A signal that comes just before a wait begins does not end it, and its handler runs behind it.
        while not wait([carried], _LOOK).done:
            pass
        carried.result()
    _LOG.info("channel: %s", "stopped" if stopped else "done")
    return program.EXIT_FAILED if stopped else program.EXIT_DONE


def _reason(error: OSError) -> str:
    return f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error)


def _open_log(given: argparse.Namespace) -> int | None:
    """Log from now on; the descriptor of the file, if it goes there."""
    handler: logging.Handler
    try:
        if given.log is not None:
            handler = logging.FileHandler(given.log)
        else:
            handler = logging.StreamHandler() if given.resume else logs.system_log()
    except OSError as error:
        raise UsageError(f"--log {given.log}: {error.strerror}") from error
    logs.start("nbdserve", handler, as_json=given.log_format == "json", verbose=given.verbose)
    if not isinstance(handler, logging.FileHandler) or handler.stream is None:
        return None
    return handler.stream.fileno()


def _leave_standard_error(log: int | None) -> None:
    """Whoever reads QEMU's errors must see their end; what children such as ssh say goes to the log."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null if log is None else log, sys.stderr.fileno())
    os.close(null)
