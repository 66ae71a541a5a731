"""The command line of nbdserve: qemu-nbd's letters where it has them, and what they mean here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve import __version__
from nbdserve.command import Parser
from nbdserve.errors import UsageError
from nbdserve.handshake import Terms
from nbdserve.server import Policy
from nbdserve.tls import Certificates, server_context
from nbdserve.uri import DEFAULT_PORT, NbdUri, Tls, parse_listen_uri

FORMATS = ("raw",)
_NO_CERTIFICATE = "TLS needs a certificate: give --tls-cert and --tls-key, or --tls-certificates"


@dataclass(frozen=True)
class ExportOptions:
    """One export, as the operator asked for it. ``offset`` is in bytes."""

    name: str
    path: Path
    format: str | None = None
    read_only: bool = False
    description: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Options:
    """Everything on the command line."""

    exports: tuple[ExportOptions, ...]
    listen: tuple[NbdUri, ...]
    policy: Policy
    discard: bool
    fence: bool
    fork: bool
    pid_file: Path | None
    verbose: bool


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; UsageError with one line where it is wrong."""
    given = _parser().parse_args(arguments)
    exports = _exports(given)
    certificates = _certificates(given)
    tls = None if certificates is None else server_context(certificates)
    policy = Policy(
        shared=given.shared,
        max_connections=given.max_connections,
        once=not given.persistent,
        terms=Terms(
            time_limit=given.handshake_timeout,
            structured_replies=not given.simple_replies,
            tls=tls,
            tls_required=given.tls_require,
        ),
    )
    if given.fence and not all(export.read_only for export in exports):
        raise UsageError("--fence keeps writers away from images that are served read-only: add -r")
    return Options(
        exports=exports,
        listen=_addresses(given, tls is not None),
        policy=policy,
        discard=given.discard in ("unmap", "on"),
        fence=given.fence,
        fork=given.fork,
        pid_file=given.pid_file,
        verbose=given.verbose,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="nbdserve",
        description="Serve disk images over NBD.",
        epilog="Sizes are in bytes, times in seconds. Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the image to serve")
    parser.add_argument("-V", "--version", action="version", version=f"nbdserve {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every client that comes and goes")
    _add_export_options(parser)
    _add_listen_options(parser)
    _add_service_options(parser)
    _add_tls_options(parser)
    return parser


def _add_export_options(parser: Parser) -> None:
    group = parser.add_argument_group("what is served")
    group.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME=FILE[,format=F][,read-only][,description=TEXT]",
        help="serve FILE under NAME; may be repeated",
    )
    group.add_argument("-x", "--export-name", metavar="NAME", help="name of FILE's export (default: empty)")
    group.add_argument("-D", "--description", default="", metavar="TEXT", help="what FILE's export is")
    group.add_argument("-f", "--format", choices=FORMATS, help="FILE's format (default: probe)")
    group.add_argument("-r", "--read-only", action="store_true", help="allow no writes")
    group.add_argument("-o", "--offset", type=_count, default=0, help="serve FILE from this offset on")
    group.add_argument(
        "--discard",
        choices=("ignore", "off", "unmap", "on"),
        default="unmap",
        help="what a trim does: nothing, or give the space back (default)",
    )
    group.add_argument(
        "--fence", action="store_true", help="let no QEMU open the image for writing while it is served"
    )


def _add_listen_options(parser: Parser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("-p", "--port", type=_port, help=f"TCP port (default {DEFAULT_PORT})")
    group.add_argument("-b", "--bind", metavar="ADDRESS", help="TCP address (default: all)")
    group.add_argument("-k", "--socket", metavar="PATH", help="Unix socket instead of TCP")
    group.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="URI",
        help="nbd://HOST:PORT or nbd+unix://?socket=PATH, nbds for TLS only; may be repeated",
    )


def _add_service_options(parser: Parser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "-e", "--shared", type=_count, default=0, help="clients at a time, others wait (0: any)"
    )
    group.add_argument(
        "--max-connections", type=_count, default=0, metavar="N", help="turn away clients beyond N (0: none)"
    )
    group.add_argument(
        "--handshake-timeout", type=_seconds, default=10.0, metavar="S", help="to choose an export (10)"
    )
    group.add_argument("--simple-replies", action="store_true", help="offer no structured replies")
    group.add_argument(
        "-t", "--persistent", action="store_true", default=True, help="go on after the last client (default)"
    )
    group.add_argument(
        "--once", dest="persistent", action="store_false", help="end when the last client has gone"
    )
    group.add_argument("--fork", action="store_true", help="return when ready, and serve in the background")
    group.add_argument("--pid-file", type=Path, metavar="PATH", help="holds the process id when ready")


def _add_tls_options(parser: Parser) -> None:
    group = parser.add_argument_group("TLS")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate of this server, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="authority that signs clients, PEM")
    group.add_argument(
        "--tls-certificates",
        type=Path,
        metavar="DIR",
        help="all three: ca-cert.pem, server-cert.pem, server-key.pem",
    )
    group.add_argument("--tls-require", action="store_true", help="serve no client without TLS")
    group.add_argument(
        "--tls-verify-peer", action="store_true", help="clients must show a certificate of the authority"
    )


def _certificates(given: argparse.Namespace) -> Certificates | None:
    single = (given.tls_cert, given.tls_key, given.tls_ca)
    if given.tls_certificates is not None:
        if any(single):
            raise UsageError("--tls-certificates names all files: leave out --tls-cert, --tls-key, --tls-ca")
        return Certificates.in_directory(given.tls_certificates, verify_peer=given.tls_verify_peer)
    if given.tls_cert is not None and given.tls_key is not None:
        return Certificates(given.tls_cert, given.tls_key, given.tls_ca, given.tls_verify_peer)
    if any(single) or given.tls_require or given.tls_verify_peer:
        raise UsageError(_NO_CERTIFICATE)
    return None


def _exports(given: argparse.Namespace) -> tuple[ExportOptions, ...]:
    found = [_export(text, given.read_only) for text in given.export]
    if given.file is not None:
        single = ExportOptions(
            given.export_name or "",
            given.file,
            given.format,
            given.read_only,
            given.description,
            given.offset,
        )
        found.insert(0, single)
    elif not found:
        raise UsageError("nothing to serve: name a FILE or an --export (see nbdserve --help)")
    elif given.export_name is not None or given.offset or given.format or given.description:
        raise UsageError("-x, -D, -f and -o belong to a FILE: with --export say it there")
    return tuple(found)


def _export(text: str, read_only: bool) -> ExportOptions:
    """Read ``NAME=FILE[,format=F][,read-only][,description=TEXT]``; two commas stand for one in a value."""
    name, equals, rest = text.partition("=")
    if not equals:
        raise UsageError(f"--export {text}: write NAME=FILE")
    path, *attributes = [part.replace("\0", ",") for part in rest.replace(",,", "\0").split(",")]
    if not path:
        raise UsageError(f"--export {text}: the file name is missing")
    options = {"read-only": read_only, "format": None, "description": ""}
    for attribute in attributes:
        key, has_value, value = attribute.partition("=")
        if key not in options or (key == "read-only") == bool(has_value):
            raise UsageError(f"--export {text}: {attribute!r} is not format=F, read-only or description=TEXT")
        options[key] = value if has_value else True
    if options["format"] not in (None, *FORMATS):
        raise UsageError(f"--export {text}: format {options['format']} is not one of {', '.join(FORMATS)}")
    return ExportOptions(
        name, Path(path), options["format"], bool(options["read-only"]), str(options["description"])
    )


def _addresses(given: argparse.Namespace, can_encrypt: bool) -> tuple[NbdUri, ...]:
    """Where to listen: what was asked for, else every address on the default port."""
    found = [parse_listen_uri(text) for text in given.listen]
    for text, address in zip(given.listen, found, strict=True):
        if address.tls not in (None, Tls()):
            raise UsageError(f"--listen {text}: only --tls-... options say how this server does TLS")
        if address.tls is not None and not can_encrypt:
            raise UsageError(f"--listen {text}: {_NO_CERTIFICATE}")
    if given.socket is not None:
        if given.port is not None or given.bind is not None:
            raise UsageError("-k is a Unix socket, -p and -b are TCP: use one, or --listen for several")
        found.append(NbdUri(socket=given.socket))
    elif given.port is not None or given.bind is not None or not found:
        port = DEFAULT_PORT if given.port is None else given.port
        found.append(NbdUri(host=given.bind or "", port=port))
    return tuple(found)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _port(text: str) -> int:
    value = _count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, 0 to 65535")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, more than 0 and up to 86400 seconds")
    return value
