"""``nbdserve channel --listen``: the destination's end of a migration over one connection, as a process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from nbdserve.channel import places
from nbdserve.channel.destination import Destination, Event, Settings
from nbdserve.cli.channel_end import Ending
from nbdserve.cli.channel_options import (
    add_session,
    parser,
    require_distinct,
    session_limits,
    start_log,
    unix_path,
)
from nbdserve.common import logs, program
from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import add_options, ownership
from nbdserve.common.program import Parser
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.connection.listeners import listen_unix
from nbdserve.monitor.channel import ChannelMonitor
from nbdserve.service import daemonize
from nbdserve.service.entrance import Entrance
from nbdserve.service.pid_file import PidFile

_LOG = logging.getLogger("nbdserve")

_DESCRIPTION = """\
Be the destination's end of a migration over one connection.

The source's end connects here (nbdserve channel --connect). Its disks are then at --socket, as a server's of
their own, for nbd-overlay, qemu-img or any other client; its RAM goes to the QEMU that waits at --incoming.
Without --tls-certificates only the loopback or a Unix socket is listened at.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command until the source was told that nothing of it is needed any more, or a signal comes."""
    given = _parser().parse_args(arguments)
    if given.token_file is None or given.socket is None:
        raise UsageError("--listen needs --socket PATH, where the source's disks are, and --token-file FILE")
    require_distinct(given, "token_file", "listen", "socket", "incoming", "qmp", "pid_file")
    tls = None if given.tls_certificates is None else places.server_context(given.tls_certificates)
    token = places.read_token(given.token_file)
    incoming = None if given.incoming is None else unix_path(given.incoming, "--incoming")
    settings = Settings(token, incoming, tls, lasting=True, limits=session_limits(given))
    whose = ownership(given.socket_mode, given.socket_owner, "--socket-")
    start_log(given, logging.StreamHandler())
    program.allow_many_descriptors()
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(daemonize.background([])) if given.fork else None
        pid_file = stack.enter_context(PidFile(given.pid_file))
        listeners = places.listen(given.listen, encrypted=tls is not None, option="--listen")
        for listener in listeners:
            stack.callback(listener.close)
        socket = listen_unix(check_socket_path(given.socket, "--socket"), whose)
        stack.callback(socket.close)
        ending = Ending()
        monitor = None
        if given.qmp is not None:
            monitor_socket = listen_unix(unix_path(given.qmp, "--qmp"))
            stack.callback(monitor_socket.close)
            monitor = ChannelMonitor(monitor_socket)

        def tell(event: Event, reason: str) -> None:
            if monitor is not None:
                monitor.tell(event, reason)
            if event is Event.DONE:
                ending.tell()

        destination = Destination(listeners, settings, tell)
        stack.callback(destination.close)
        entrance = Entrance(socket, destination.adopt)
        stack.callback(entrance.close)
        if monitor is not None:
            stack.enter_context(monitor.served(destination, ending.tell))
        destination.start()
        entrance.start()
        pid_file.publish()
        for listener in listeners:
            _LOG.info("channel: listening on %s; the source's disks are at %s", listener, socket)
        if background is not None:
            start_log(given, logs.system_log())
            background.ready()
        ending.wait()
    return program.EXIT_DONE


def _parser() -> Parser:
    made = parser(_DESCRIPTION)
    add = made.add_argument
    add("--listen", metavar="PLACE", required=True, help="where the source connects: HOST:PORT or unix:PATH")
    add("--socket", metavar="PATH", help="a Unix socket at which the source's disks are")
    add_options(add, "--socket-", "that socket")
    add("--incoming", metavar="unix:PATH", help="where the destination's QEMU waits for the RAM")
    add_session(add, certificates="ca-cert.pem, server-cert.pem and server-key.pem")
    add("--qmp", metavar="unix:PATH", help="live control: query-channel, channel-done, quit")
    add("--fork", action="store_true", help="return when ready, and go on in the background")
    return made
