"""What the command line says, as values: exports, addresses, certificates and how the service behaves."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve.backends.offset import Slice
from nbdserve.backends.probe import FORMATS
from nbdserve.common.errors import UsageError
from nbdserve.common.ownership import PRIVATE, Ownership, ownership
from nbdserve.common.pem import Validity
from nbdserve.common.sizes import parse_size
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import DEFAULT_PORT, NbdUri, Tls, is_ipv6, parse_listen_uri
from nbdserve.connection.policy import Policy
from nbdserve.exports.export_options import DirectoryOptions, ExportOptions, ImageOptions, source
from nbdserve.service.certificates import Certificates
from nbdserve.service.privileges import Identity

_NO_CERTIFICATE = (
    "TLS needs a certificate, or keys: give --tls-cert and --tls-key, or --tls-certificates, or --tls-psk"
)


@dataclass(frozen=True)
class ServiceOptions:
    """How the server fits into its system."""

    verbose: bool = False
    json_log: bool = False
    fork: bool = False
    pid_file: Path | None = None
    stdio: bool = False
    monitor: str | None = None
    """The path of the monitor's socket."""
    monitor_owner: Ownership = PRIVATE
    socket_owner: Ownership = PRIVATE
    """Whose the Unix sockets of clients are."""
    metrics: tuple[str, int] | None = None
    """The host and port where metrics are told; an empty host is every address."""
    identity: Identity | None = None
    """Who the server becomes when it has opened everything."""


@dataclass(frozen=True)
class Options:
    """Everything on the command line."""

    exports: tuple[ExportOptions, ...]
    directory: DirectoryOptions | None
    images: ImageOptions
    listen: tuple[NbdUri, ...]
    """Where to listen; empty when nothing was said about it."""
    policy: Policy
    service: ServiceOptions
    validity: Validity = ()
    """Until when the certificates are valid."""


def certificates(given: argparse.Namespace) -> Certificates | None:
    """Return the files that the TLS options name; None without TLS. UsageError where they make no sense."""
    single = (given.tls_cert, given.tls_key, given.tls_ca)
    if given.tls_psk is not None:
        if any(single) or given.tls_certificates is not None or given.tls_verify_peer:
            raise UsageError("--tls-psk takes the place of certificates: leave out the options about them")
        return None
    if given.tls_certificates is not None:
        if any(single):
            raise UsageError("--tls-certificates names all files: leave out --tls-cert, --tls-key, --tls-ca")
        return Certificates.in_directory(given.tls_certificates, verify_peer=given.tls_verify_peer)
    if given.tls_cert is not None and given.tls_key is not None:
        return Certificates(given.tls_cert, given.tls_key, given.tls_ca, given.tls_verify_peer)
    if any(single) or given.tls_require or given.tls_verify_peer:
        raise UsageError(_NO_CERTIFICATE)
    return None


def exports(given: argparse.Namespace) -> tuple[ExportOptions, ...]:
    """Return what is to be served; UsageError where the options make no sense."""
    found = [parse_export(text, read_only=given.read_only) for text in given.export]
    if given.file is not None:
        single = ExportOptions(
            given.export_name or "",
            source(given.file),
            given.format,
            given.read_only,
            given.description,
            Slice(given.offset),
        )
        found.insert(0, single)
    elif not found and given.directory is None:
        raise UsageError("nothing to serve: name a FILE, an --export or a --directory (see nbdserve --help)")
    elif given.directory is not None and given.format not in (None, "raw"):
        raise UsageError(f"--directory serves raw images: name those in format {given.format} by --export")
    elif given.export_name is not None or given.offset or given.description:
        raise UsageError("-x, -D and -o belong to a FILE: with --export say it there")
    elif given.format is not None and given.directory is None:
        raise UsageError("-f belongs to a FILE: with --export say it there")
    return tuple(found)


def directory(given: argparse.Namespace) -> DirectoryOptions | None:
    """Return the directory to be served, if there is one; -f belongs to a FILE when one is given."""
    if given.directory is None:
        return None
    return DirectoryOptions(given.directory, None if given.file else given.format, given.read_only)


_EXPORT = re.compile(r"((?:[^=]|==)*)=(?!=)(.*)", re.DOTALL)
_ATTRIBUTES = ("read-only", "format", "description", "offset", "size")


def parse_export(text: str, *, read_only: bool) -> ExportOptions:
    """Read ``NAME=FILE[,ATTRIBUTE...]``; two commas stand for one in a value, and ``==`` for one in NAME."""
    match = _EXPORT.fullmatch(text)
    if match is None:
        raise UsageError(f"--export {text}: write NAME=FILE, and == for each = in NAME")
    name, rest = match[1].replace("==", "="), match[2]
    path, *attributes = [part.replace("\0", ",") for part in rest.replace(",,", "\0").split(",")]
    if not path:
        raise UsageError(f"--export {text}: the file name is missing")
    file = source(path)
    if isinstance(file, Path) and "=" in path and not os.path.lexists(file):
        raise UsageError(f"--export {text}: there is no file {path}; if a = belongs to NAME, write ==")
    given: dict[str, str] = {}
    for attribute in attributes:
        key, has_value, value = attribute.partition("=")
        if key not in _ATTRIBUTES or (key == "read-only") == bool(has_value):
            raise UsageError(
                f"--export {text}: {attribute!r} is not read-only, format=F, offset=N, size=N "
                "or description=TEXT"
            )
        given[key] = value
    if given.get("format", "raw") not in FORMATS:
        raise UsageError(f"--export {text}: format {given['format']} is not one of {', '.join(FORMATS)}")
    return ExportOptions(
        name,
        file,
        given.get("format"),
        read_only or "read-only" in given,
        given.get("description", ""),
        Slice(
            parse_size(given.get("offset", "0"), f"--export {name}: offset"),
            parse_size(given["size"], f"--export {name}: size") if "size" in given else None,
        ),
    )


def addresses(given: argparse.Namespace, can_encrypt: bool) -> tuple[NbdUri, ...]:
    """Tell where to listen, as far as anything was said about it; UsageError where it makes no sense."""
    found = [parse_listen_uri(text) for text in given.listen]
    for text, address in zip(given.listen, found, strict=True):
        if address.tls not in (None, Tls()):
            raise UsageError(f"--listen {text}: only --tls-... options say how this server does TLS")
        if address.tls is not None and not can_encrypt:
            raise UsageError(f"--listen {text}: {_NO_CERTIFICATE}")
    if given.socket is not None:
        if given.port is not None or given.bind is not None:
            raise UsageError("-k is a Unix socket, -p and -b are TCP: use one, or --listen for several")
        found.append(NbdUri(socket=check_socket_path(given.socket, "--socket")))
    elif given.port is not None or given.bind is not None:
        port = DEFAULT_PORT if given.port is None else given.port
        found.append(NbdUri(host=bare_host(given.bind or "", f"--bind {given.bind}"), port=port))
    if found and given.stdio:
        raise UsageError("--stdio serves the one client that is there: leave out -k, -p, -b and --listen")
    return tuple(found)


def monitor_path(text: str) -> str:
    """Return the path in ``--qmp unix:PATH``."""
    kind, _, path = text.partition(":")
    if kind != "unix" or not path:
        raise UsageError(f"--qmp {text}: write unix:PATH")
    return check_socket_path(path, "--qmp")


def socket_owner(given: argparse.Namespace, addresses: Sequence[NbdUri]) -> Ownership:
    """Tell whose the clients' Unix sockets are to be; UsageError where that makes no sense."""
    found = ownership(given.socket_mode, given.socket_owner, "--socket-")
    paths = [each.socket for each in addresses if each.socket and not each.socket.startswith("\0")]
    if found and not paths:
        raise UsageError(
            "--socket-mode and --socket-owner are for a Unix socket with a path: give it with -k"
        )
    return found


def monitor_owner(given: argparse.Namespace) -> Ownership:
    """Tell whose the monitor's socket is to be; UsageError where that makes no sense."""
    found = ownership(given.qmp_mode, given.qmp_owner, "--qmp-")
    if found and given.qmp is None:
        raise UsageError("--qmp-mode and --qmp-owner are for the monitor: add --qmp")
    return found


def host_and_port(text: str) -> tuple[str, int]:
    """Return the two parts of ``--metrics HOST:PORT``; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    usable = colon and re.fullmatch("[0-9]{1,5}", port) and int(port) <= 65535
    if not usable or (":" in host and not host.startswith("[")):
        raise UsageError(f"--metrics {text}: write HOST:PORT, with an IPv6 address in brackets")
    return bare_host(host, f"--metrics {text}"), int(port)


def bare_host(text: str, where: str) -> str:
    """Return a host's name or address without the brackets of an IPv6 address; UsageError if none."""
    if not text.startswith("["):
        return text
    if not text.endswith("]") or not is_ipv6(text[1:-1]):
        raise UsageError(f"{where}: {text} is not an IPv6 address in brackets")
    return text[1:-1]
