"""The command nbdserve: open the images, listen, and serve until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable

from nbdserve.cli import options
from nbdserve.cli.config import Options, ServiceOptions
from nbdserve.common import logs, program
from nbdserve.common.errors import UsageError
from nbdserve.common.uri import DEFAULT_PORT, NbdUri
from nbdserve.connection.listeners import Listener, Visitor, listen_tcp, listen_unix
from nbdserve.exports.directory import Directory
from nbdserve.exports.images import open_export
from nbdserve.exports.served_exports import Exports
from nbdserve.service import activation, daemonize, privileges, stdio
from nbdserve.service.notify import ServiceManager
from nbdserve.service.pid_file import PidFile
from nbdserve.service.server import Server

_SECTOR = 512
_FEW = 8
_LOG = logging.getLogger("nbdserve")


def main() -> int:
    """Run the console script."""
    if sys.argv[1:2] == ["channel"]:
        from nbdserve.cli import channel_command
        from nbdserve.cli.channel_options import PROGRAM

        return program.run(PROGRAM, lambda: channel_command.main(sys.argv[2:]))
    return program.run("nbdserve", lambda: serve(options.parse(sys.argv[1:])))


def serve(given: Options) -> int:
    """Serve what the options ask for; returns the exit code when the server has ended in good order."""
    _start_log(given.service, logging.StreamHandler())
    program.allow_many_descriptors()
    with contextlib.ExitStack() as stack:
        inherited = activation.inherit(os.environ)
        manager = ServiceManager(os.environ)
        _check(given, inherited)
        announce = _detach(stack, given.service, manager)
        pid_file = stack.enter_context(PidFile(given.service.pid_file))
        exports = _open_exports(stack, given)
        listeners = _open_listeners(stack, given, inherited)
        monitor = _open_monitor(stack, given.service, inherited)
        server = Server(exports, listeners, given.policy, manager)
        server.stop_on_signals()
        _attach(stack, server, monitor, given, pid_file)
        for listener in listeners:
            _LOG.info("serving %s on %s", _some(exports.names()), listener)
        for visitor in inherited.visitors or _visitors(stack, given.service, inherited):
            server.welcome(visitor)
        announce()
        manager.tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS=serving {len(exports.names())} exports")
        server.run()
    return program.EXIT_DONE if exports.intact else program.EXIT_FAILED


def _some(names: list[str]) -> str:
    """The names, or how many there are."""
    return ", ".join(map(repr, names)) if len(names) <= _FEW else f"{len(names)} exports"


def _check(given: Options, inherited: activation.Inheritance) -> None:
    if inherited and given.listen:
        raise UsageError("LISTEN_FDS names sockets to serve: leave out -k, -p, -b and --listen")
    if inherited and given.service.fork:
        raise UsageError("who hands over sockets watches the process that gets them: leave out --fork")


def _open_exports(stack: contextlib.ExitStack, given: Options) -> Exports:
    shelf = None if given.directory is None else Directory(given.directory, given.images)
    exports = Exports(shelf=shelf, patience=given.policy.terms.time_limit)
    stack.callback(exports.close)
    for wanted in given.exports:
        export = open_export(wanted, given.images)
        exports.add(export)
        if export.backend.size % _SECTOR and not given.policy.terms.structured_replies:
            _LOG.warning(
                "%s: %d bytes are no whole sectors; without structured replies QEMU 7.2 waits for ever for "
                "the rest of the last: pad the image to a multiple of 512, or leave out --simple-replies",
                wanted.source,
                export.backend.size,
            )
    return exports


def _open_listeners(
    stack: contextlib.ExitStack, given: Options, inherited: activation.Inheritance
) -> list[Listener]:
    """Listen where the operator, or whoever hands sockets over, wants it; by default everywhere."""
    if inherited:
        return list(inherited.listeners)
    if given.service.stdio:
        return []
    addresses = given.listen or (NbdUri(host="", port=DEFAULT_PORT),)
    return [listener for address in addresses for listener in _listen(stack, address, given.service)]


def _listen(stack: contextlib.ExitStack, address: NbdUri, service: ServiceOptions) -> list[Listener]:
    """Listen at one address, which may be several sockets."""
    if address.socket is not None:
        found = [listen_unix(address.socket, service.socket_owner)]
    else:
        found = listen_tcp(address.host or None, address.port)
    for listener in found:
        listener.tls_required = address.tls is not None
        stack.callback(listener.close)
    return found


def _open_monitor(
    stack: contextlib.ExitStack, service: ServiceOptions, inherited: activation.Inheritance
) -> list[Listener]:
    """The socket of the monitor, if there is to be one."""
    if inherited.monitor is not None:
        return [inherited.monitor]
    if service.monitor is None:
        return []
    listener = listen_unix(service.monitor, service.monitor_owner)
    stack.callback(listener.close)
    return [listener]


def _detach(
    stack: contextlib.ExitStack, service: ServiceOptions, manager: ServiceManager
) -> Callable[[], None]:
    """Go to the background, if asked to; returns what lets the command that the operator typed return."""
    if not service.fork:
        return lambda: None
    background = stack.enter_context(daemonize.background(manager.descriptors()))

    def announce() -> None:
        _start_log(service, logs.system_log())
        background.ready()

    return announce


def _attach(
    stack: contextlib.ExitStack, server: Server, monitor: list[Listener], given: Options, pid_file: PidFile
) -> None:
    """What goes on beside the server, and whom all of it runs as. Their modules cost memory where unused."""
    service = given.service
    if service.metrics is not None:
        from nbdserve.monitor import metrics

        stack.enter_context(metrics.served(metrics.Collector(server), *service.metrics))
    if given.validity:
        from nbdserve.service import certificate_expiry

        stack.enter_context(certificate_expiry.watched(given.validity))
    pid_file.publish()
    if service.identity is not None:
        privileges.become(service.identity)
    for listener in monitor:
        from nbdserve.monitor import control

        stack.enter_context(control.served(server, listener, given.images))


def _visitors(
    stack: contextlib.ExitStack, service: ServiceOptions, inherited: activation.Inheritance
) -> list[Visitor]:
    """The client on standard input and output; with a socket handed over it comes there instead."""
    if not service.stdio or inherited:
        return []
    if stdio.shares_stderr():
        _start_log(service, logs.system_log())
    return [stack.enter_context(stdio.client())]


def _start_log(service: ServiceOptions, handler: logging.Handler) -> None:
    logs.start("nbdserve", handler, as_json=service.json_log, verbose=service.verbose)
