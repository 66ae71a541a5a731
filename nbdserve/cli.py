"""The command nbdserve: open the images, listen, and serve until told to stop."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import signal
import sys
from pathlib import Path

from nbdserve import command, daemonize, options
from nbdserve.backends.file import FileBackend, Slice
from nbdserve.backends.imagelocks import READER, ImageLocks, Permission
from nbdserve.backends.probe import require_raw
from nbdserve.exports import Export, Exports
from nbdserve.listeners import Listener, listen_tcp, listen_unix
from nbdserve.server import Server
from nbdserve.uri import NbdUri

_SYSLOG = "/dev/log"
_LOG = logging.getLogger("nbdserve")


def main() -> int:
    """Entry point of the console script."""
    return command.run("nbdserve", lambda: serve(options.parse(sys.argv[1:])))


def serve(given: options.Options) -> int:
    """Serve what the options ask for; returns the exit code when the server has ended in good order."""
    _log_to(logging.StreamHandler(), given.verbose)
    with contextlib.ExitStack() as stack:
        backends = [_open(stack, wanted, given) for wanted in given.exports]
        exports = Exports(
            Export(wanted.name, backend, wanted.description)
            for wanted, backend in zip(given.exports, backends, strict=True)
        )
        listeners = [listener for address in given.listen for listener in _listen(stack, address)]
        background = None
        if given.fork:
            keep = [backend.fileno() for backend in backends]
            background = daemonize.detach(keep + [listener.sock.fileno() for listener in listeners])
        server = Server(exports, listeners, given.policy)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: server.stop())
        stack.enter_context(daemonize.pid_file(given.pid_file))
        for listener in listeners:
            _LOG.info("serving %s on %s", ", ".join(repr(name) for name in exports.names()), listener)
        if background is not None:
            _log_to(_system_log(), given.verbose)
            background.ready()
        server.run()
        for backend in backends:
            if not backend.capabilities.read_only:
                backend.flush()
    return command.EXIT_DONE


def _open(stack: contextlib.ExitStack, wanted: options.ExportOptions, given: options.Options) -> FileBackend:
    """Open one image, with QEMU's locks on it."""
    if wanted.format is None:
        require_raw(wanted.path, wanted.offset)
        _LOG.info("%s: no format given, served as raw", wanted.path)
    part = Slice(wanted.offset)
    backend = FileBackend(wanted.path, read_only=wanted.read_only, part=part, discard=given.discard)
    stack.callback(backend.close)
    # What qemu-nbd holds on a raw image; nobody may cut off what is being served.
    used = READER if wanted.read_only else READER | Permission.WRITE
    locks = ImageLocks(backend.fileno(), str(wanted.path))
    locks.hold(used, Permission.RESIZE)
    if given.fence:
        locks.fence()
    return backend


def _listen(stack: contextlib.ExitStack, address: NbdUri) -> list[Listener]:
    """Listen at one address, which may be several sockets."""
    if address.socket is not None:
        found = [listen_unix(address.socket)]
    else:
        found = listen_tcp(address.host or None, address.port)
    for listener in found:
        listener.tls_required = address.tls is not None
        stack.callback(listener.close)
    return found


def _log_to(handler: logging.Handler, verbose: bool) -> None:
    handler.setFormatter(logging.Formatter("nbdserve: %(message)s"))
    for old in list(_LOG.handlers):
        _LOG.removeHandler(old)
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    _LOG.propagate = False


def _system_log() -> logging.Handler:
    """Where a daemon's log goes: to syslog, if this system has one."""
    if Path(_SYSLOG).exists():
        return logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
    return logging.NullHandler()
