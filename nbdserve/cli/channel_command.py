"""The subcommand ``nbdserve channel``: the source's end of a migration over one connection."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nbdserve.channel.child.fence import Fence
from nbdserve.channel.child.pipes import RamPipes
from nbdserve.channel.child.worker import Lifeline, require_pipes, split
from nbdserve.channel.relay import relay
from nbdserve.channel.source import Source, SourceSettings
from nbdserve.cli.channel_end import Ending
from nbdserve.cli.channel_options import (
    PROGRAM,
    add_session,
    add_source,
    parser,
    require_distinct,
    source_settings,
    start_log,
)
from nbdserve.cli.config import parse_export
from nbdserve.common import logs, program
from nbdserve.common.errors import OperatorError, UsageError, reason_of
from nbdserve.common.program import Parser, seconds
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.threads import Thread, promised
from nbdserve.connection.policy import Policy
from nbdserve.exports.export_options import ExportOptions, ImageOptions
from nbdserve.exports.images import open_export
from nbdserve.exports.served_exports import Exports
from nbdserve.service.pid_file import PidFile
from nbdserve.service.server import Server

_LOG = logging.getLogger("nbdserve")
_DAY = 86400.0
_END = 12.0
"""Seconds in which the server ends."""

_DESCRIPTION = """\
Carry a migration over one connection: the guest's RAM, and the disks that are still to be copied.

QEMU itself starts this, on the source, and waits only until the RAM has gone over:

    migrate "exec:nbdserve channel --connect HOST:PORT --export NAME=FILE --token-file FILE ..."

What it leaves behind serves the disks, read-only, and keeps every QEMU here from writing to them, until
nbd-overlay serve --channel, on the destination, needs them no more. Without --tls-certificates only the
loopback, a Unix socket or ssh:// is connected to.
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
    require_distinct(given, "token_file", "log", "pid_file")
    exports = [parse_export(text, read_only=True) for text in given.export]
    program.allow_many_descriptors()
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
    made = parser(_DESCRIPTION)
    add = made.add_argument
    add_source(add, "nbd-overlay serve --channel")
    add("--resume", action="store_true", help="go on with a session whose source end has ended; stays here")
    add(
        "--reconnect-timeout",
        type=seconds,
        default=_DAY,
        metavar="S",
        help="for how long a destination that is lost is looked for (%(default)g)",
    )
    certificates = "ca-cert.pem, client-cert.pem and client-key.pem"
    add_session(add, certificates=certificates, pid="the process id of what is left behind")
    add(
        "--log",
        type=Path,
        metavar="FILE",
        help="where to log (default: the system log)",
    )
    add("--relay", metavar="PATH", help="only pass standard input and output on to a socket, as ssh:// needs")
    return made


def _settings(given: argparse.Namespace) -> SourceSettings:
    if not given.connect:
        raise UsageError("say where the destination is: --connect PLACE")
    if given.token_file is None:
        raise UsageError("name the file of the session's secret: --token-file FILE")
    return source_settings(given, resume=given.resume, patience=given.reconnect_timeout)


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
        fence = Fence([each.source for each in wanted if isinstance(each.source, Path)])
        stack.callback(fence.close)
        ram = None if lifeline is None else RamPipes(lifeline.reader, lifeline.writer, lifeline.over)
        source = Source(settings, server.welcome, ram, arrived=fence.stand)
        ending = Ending()
        pid_file.publish()
        carried = promised("channel", source.run)
        carried.add_done_callback(lambda _: ending.tell())
        ending.wait()
        stopped = not carried.done()
        if stopped:
            source.stop()
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
    start_log(given, handler)
    if not isinstance(handler, logging.FileHandler) or handler.stream is None:
        return None
    return handler.stream.fileno()


def _leave_standard_error(log: int | None) -> None:
    """Whoever reads QEMU's errors must see their end; what children such as ssh say goes to the log."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null if log is None else log, sys.stderr.fileno())
    os.close(null)
