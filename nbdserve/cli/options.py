"""The command line of nbdserve: qemu-nbd's letters where it has them, and what they mean here.

A new option is added here, and gets its value in config.py, where it is refused if it makes no sense beside
the others; then ``make docs``.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Sequence

from nbdserve import __version__
from nbdserve.backends.filters import Caching, DetectZeroes
from nbdserve.backends.probe import FORMATS
from nbdserve.cli.config import (
    Options,
    ServiceOptions,
    addresses,
    certificates,
    directory,
    exports,
    host_and_port,
    monitor_owner,
    monitor_path,
    socket_owner,
)
from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import Ownership, add_options
from nbdserve.common.program import Parser, count, filled_path, patience, port, positive, seconds
from nbdserve.common.sizes import parse_size
from nbdserve.common.uri import DEFAULT_PORT
from nbdserve.connection.allow_list import AllowList, parse_network
from nbdserve.connection.handshake import Terms
from nbdserve.connection.policy import Policy
from nbdserve.connection.psk import psk_context
from nbdserve.exports.export_options import ImageOptions
from nbdserve.service.certificates import Identity, load
from nbdserve.service.privileges import identity
from nbdserve.transmission.busy_polling import LONGEST, MOMENT


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; UsageError with one line where it is wrong."""
    given = _parser().parse_args(arguments)
    wanted = exports(given)
    unwritten = all(export.read_only for export in wanted) and (given.directory is None or given.read_only)
    if given.fence and not unwritten:
        raise UsageError("--fence keeps writers away from images that are served read-only: add -r")
    files = certificates(given)
    identity = None if files is None else load(files)
    terms = _terms(given, identity)
    listen = addresses(given, terms.tls is not None)
    return Options(
        exports=wanted,
        directory=directory(given),
        images=_images(given),
        listen=listen,
        policy=_policy(given, terms),
        validity=() if identity is None else identity.validity,
        service=_service(given, socket_owner(given, listen)),
    )


def _images(given: argparse.Namespace) -> ImageOptions:
    options = ImageOptions(
        discard=given.discard in ("unmap", "on"),
        fence=given.fence,
        detect_zeroes=DetectZeroes(given.detect_zeroes),
        caching=None if given.cache is None else Caching(given.cache),
        block_hashes=given.block_hashes,
        aio=given.aio,
        patience=given.reconnect_timeout,
    )
    if options.detect_zeroes is DetectZeroes.UNMAP and not options.discard:
        raise UsageError("--detect-zeroes=unmap gives space back, which --discard=ignore forbids: use =on")
    return options


def _terms(given: argparse.Namespace, identity: Identity | None) -> Terms:
    return Terms(
        time_limit=given.handshake_timeout,
        structured_replies=not given.simple_replies,
        tls=_tls(given, identity),
        tls_required=given.tls_require,
    )


def _tls(given: argparse.Namespace, identity: Identity | None) -> ssl.SSLContext | None:
    if given.tls_psk is not None:
        return psk_context(given.tls_psk)
    return None if identity is None else identity.context


def _policy(given: argparse.Namespace, terms: Terms) -> Policy:
    return Policy(
        shared=given.shared,
        max_connections=given.max_connections,
        max_handshakes=given.max_handshakes,
        busy_poll=given.busy_poll,
        request_memory=parse_size(given.request_memory, "--request-memory"),
        once=not given.persistent,
        timed=given.metrics is not None,
        allow=AllowList(parse_network(text) for text in given.allow),
        terms=terms,
    )


def _service(given: argparse.Namespace, socket_owner: Ownership) -> ServiceOptions:
    if given.stdio and given.fork:
        raise UsageError("--stdio serves whoever started it, and --fork leaves them: use one of the two")
    return ServiceOptions(
        verbose=given.verbose,
        json_log=given.log_format == "json",
        fork=given.fork,
        pid_file=given.pid_file,
        stdio=given.stdio,
        monitor=None if given.qmp is None else monitor_path(given.qmp),
        monitor_owner=monitor_owner(given),
        socket_owner=socket_owner,
        metrics=None if given.metrics is None else host_and_port(given.metrics),
        identity=identity(given.user, given.group),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="nbdserve",
        description="Serve disk images over NBD.",
        epilog="Sizes are in bytes, times in seconds. Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="the image to serve, or the nbd:// URI of another server's export",
    )
    parser.add_argument("-V", "--version", action="version", version=f"nbdserve {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every client that comes and goes")
    _add_export_options(parser)
    _add_listen_options(parser)
    _add_client_options(parser)
    _add_service_options(parser)
    _add_tls_options(parser)
    return parser


def _add_export_options(parser: Parser) -> None:
    group = parser.add_argument_group("what is served")
    group.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FILE[,format=F][,read-only][,description=TEXT][,offset=N][,size=N]",
        help="serve FILE under NAME, in which == stands for =; may be repeated",
    )
    group.add_argument(
        "--directory",
        type=filled_path,
        metavar="DIR",
        help="serve each file in DIR, a raw image, under its name",
    )
    group.add_argument("-x", "--export-name", metavar="NAME", help="name of FILE's export (default: empty)")
    group.add_argument("-D", "--description", default="", metavar="TEXT", help="what FILE's export is")
    group.add_argument("-f", "--format", choices=FORMATS, help="FILE's format (default: probe)")
    group.add_argument("-r", "--read-only", action="store_true", help="allow no writes")
    group.add_argument("-o", "--offset", type=count, default=0, help="serve FILE from this offset on")
    group.add_argument(
        "--discard",
        choices=("ignore", "off", "unmap", "on"),
        default="unmap",
        help="what a trim does: nothing, or give the space back (default)",
    )
    group.add_argument(
        "--detect-zeroes",
        choices=[mode.value for mode in DetectZeroes],
        default=DetectZeroes.OFF.value,
        help="what writes of zeroes become: writes (default), zeroing, or holes",
    )
    group.add_argument(
        "--cache",
        choices=[mode.value for mode in Caching],
        help="how images are read and written, as in QEMU (default: writeback; none for a block device, or "
        "a file on FUSE, that is served read-only, as others may write to it past the page cache)",
    )
    group.add_argument(
        "-n", "--nocache", dest="cache", action="store_const", const=Caching.NONE.value, help="--cache=none"
    )
    group.add_argument(
        "--aio", choices=("threads", "native", "io_uring"), help="passed to qemu-nbd; raw images need none"
    )
    group.add_argument(
        "--block-hashes", action="store_true", help="tell hashes of blocks to nbd-overlay serve --seed"
    )
    group.add_argument(
        "-A", "--allocation-depth", action="store_true", help="always told, as far as it is known"
    )
    group.add_argument(
        "--reconnect-timeout",
        type=patience,
        default=10.0,
        metavar="S",
        help="how long requests wait for another server that is lost, or, if over 60, silent (%(default)g)",
    )
    group.add_argument(
        "--fence",
        action="store_true",
        help="let no QEMU open the image for writing while it is served; not before a migrating guest "
        "has left, whose QEMU would abort if it had to come back",
    )


def _add_listen_options(parser: Parser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("-p", "--port", type=port, help=f"TCP port (default {DEFAULT_PORT})")
    group.add_argument("-b", "--bind", metavar="ADDRESS", help="TCP address (default: all)")
    group.add_argument("-k", "--socket", metavar="PATH", help="Unix socket instead of TCP")
    add_options(group.add_argument, "--socket-", "Unix sockets")
    group.add_argument("--stdio", action="store_true", help="serve one client on standard input and output")
    group.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="URI",
        help="nbd://HOST:PORT or nbd+unix://?socket=PATH, nbds for TLS only; may be repeated",
    )


def _add_client_options(parser: Parser) -> None:
    group = parser.add_argument_group("whom")
    group.add_argument(
        "-e", "--shared", type=count, default=0, help="clients at a time, others wait (0: any)"
    )
    group.add_argument(
        "--max-connections", type=count, default=0, metavar="N", help="turn away clients beyond N (0: none)"
    )
    group.add_argument(
        "--max-handshakes",
        type=positive,
        default=Policy.max_handshakes,
        metavar="N",
        help="clients that have not chosen an export; beyond N the slowest is cut off (%(default)s)",
    )
    group.add_argument(
        "--handshake-timeout", type=seconds, default=10.0, metavar="S", help="to choose an export (10)"
    )
    group.add_argument(
        "--request-memory",
        default="512M",
        metavar="SIZE",
        help="what requests that wait for a disk or a network may hold, of all clients (%(default)s)",
    )
    group.add_argument(
        "--busy-poll",
        type=_microseconds,
        default=MOMENT,
        metavar="US",
        help=f"microseconds to look out for the only active client's next request ({MOMENT * 1e6:.0f})",
    )
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CIDR",
        help="serve only clients from this network, and those of Unix sockets; may be repeated",
    )
    group.add_argument("--simple-replies", action="store_true", help="offer no structured replies")


def _microseconds(text: str) -> float:
    value = count(text) / 1e6
    if value > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {LONGEST * 1e6:.0f} microseconds")
    return value


def _add_service_options(parser: Parser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "-t", "--persistent", action="store_true", default=True, help="go on after the last client (default)"
    )
    group.add_argument(
        "--once", dest="persistent", action="store_false", help="end when the last client has gone"
    )
    group.add_argument("--fork", action="store_true", help="return when ready, and serve in the background")
    group.add_argument("--pid-file", type=filled_path, metavar="PATH", help="holds the process id when ready")
    group.add_argument("--user", metavar="USER", help="become this user when everything is open")
    group.add_argument("--group", metavar="GROUP", help="become this group")
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="lines of text, or an object on each"
    )
    group.add_argument("--qmp", metavar="unix:PATH", help="live control over QEMU's monitor protocol")
    add_options(group.add_argument, "--qmp-", "the monitor's socket")
    group.add_argument("--metrics", metavar="HOST:PORT", help="tell Prometheus over HTTP")


def _add_tls_options(parser: Parser) -> None:
    group = parser.add_argument_group("TLS")
    group.add_argument("--tls-cert", type=filled_path, metavar="FILE", help="certificate of this server, PEM")
    group.add_argument("--tls-key", type=filled_path, metavar="FILE", help="its private key, PEM")
    group.add_argument("--tls-ca", type=filled_path, metavar="FILE", help="authority that signs clients, PEM")
    group.add_argument(
        "--tls-certificates",
        type=filled_path,
        metavar="DIR",
        help="all three: ca-cert.pem, server-cert.pem, server-key.pem",
    )
    group.add_argument(
        "--tls-psk",
        type=filled_path,
        metavar="FILE",
        help="in place of certificates, keys that clients know: lines USER:HEXKEY, as psktool writes them",
    )
    group.add_argument("--tls-require", action="store_true", help="serve no client without TLS")
    group.add_argument(
        "--tls-verify-peer", action="store_true", help="clients must show a certificate of the authority"
    )
