"""NBD addresses: the URIs of the NBD project's doc/uri.md and QEMU's older ``nbd:`` strings.

    nbd://[USER@]HOST[:PORT]/EXPORT             nbds://...       the same over TLS
    nbd+unix:///EXPORT?socket=PATH              nbds+unix://...  the same over TLS
    nbd:HOST:PORT[:exportname=EXPORT]           nbd:unix:PATH[:exportname=EXPORT]

An IPv6 HOST stands in brackets, and may name its interface: ``[fe80::1%25eth0]``, or ``[fe80::1%eth0]``.
The path of a URI without its first ``/`` is the export name, so ``nbd://host//x`` names the export ``/x``.
Nothing here looks up a name or opens a socket.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from enum import Enum
from urllib.parse import quote, unquote_to_bytes

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT

DEFAULT_PORT = 10809
"""IANA's port for NBD; what a URI without a port means."""

EXPORT_NAME_LIMIT = 4096
"""Longest export name in bytes (NBD protocol, "Values": strings)."""

ACCEPTED = (
    "use nbd://HOST[:PORT]/EXPORT, nbds://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, "
    "nbds+unix:///EXPORT?socket=PATH, nbd:HOST:PORT[:exportname=EXPORT] or nbd:unix:PATH[:exportname=EXPORT]"
)

_SCHEMES = {
    "nbd": (False, False),
    "nbd+tcp": (False, False),
    "nbds": (False, True),
    "nbd+unix": (True, False),
    "nbds+unix": (True, True),
}
"""Scheme to (over a Unix socket, over TLS)."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^?#]*)?(?:\?([^#]*))?(#.*)?", re.DOTALL)
_LEGACY_TCP = re.compile(r"(\[[^\]]*\]|[^:\[\]]*):([^:]*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:([^@]*)@)?(\[[^\]]*\]|[^:\[\]@]*)(?::([^:]*))?", re.DOTALL)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ZONE = re.compile(r"[^\x00-\x20\x7f/%:\[\]]{1,15}")
"""The name of a network interface, or its number."""
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")


class TlsType(Enum):
    """How the two ends of a TLS connection prove who they are (``tls-type``)."""

    ANONYMOUS = "anon"
    CERTIFICATES = "x509"
    PRE_SHARED_KEY = "psk"


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS parameters of a URI; None where the URI does not say."""

    type: TlsType | None = None
    hostname: str | None = None
    verify_peer: bool = True
    certificates: str | None = None
    psk_file: str | None = None


@dataclass(frozen=True, slots=True)
class NbdUri:
    """One NBD address. ``socket`` is the path of a Unix socket; with None, ``host`` and ``port`` count.

    A socket path that begins with NUL is in Linux's abstract namespace. In an address to listen on, an empty
    host means every local address and port 0 any free port.
    """

    host: str = "localhost"
    port: int = DEFAULT_PORT
    socket: str | None = None
    export: str = ""
    tls: Tls | None = None
    user: str | None = None

    def __str__(self) -> str:
        """The canonical URI, as libnbd and (without TLS, which its URIs lack) QEMU understand it."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        user = f"{quote(self.user, safe='')}@" if self.user is not None else ""
        authority = user if self.socket is not None else f"{user}{self._quoted_host()}:{self.port}"
        query = "&".join(f"{key}={quote(value, safe='/')}" for key, value in self._parameters())
        return f"{scheme}://{authority}/{quote(self.export, safe='/')}" + (f"?{query}" if query else "")

    def qemu_server(self) -> dict[str, str | bool]:
        """Return the ``server`` member of QEMU's blockdev driver ``nbd`` (a SocketAddress)."""
        if self.socket is None:
            return {"type": "inet", "host": self.host, "port": str(self.port)}
        if self.socket.startswith("\0"):
            return {"type": "unix", "path": self.socket[1:], "abstract": True}
        return {"type": "unix", "path": self.socket}

    def with_export(self, export: str) -> NbdUri:
        """Return the same server, another export."""
        return replace(self, export=export)

    def _quoted_host(self) -> str:
        return f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host, safe="")

    def _parameters(self) -> list[tuple[str, str]]:
        found = [("socket", self.socket)]
        if self.tls:
            found += [
                ("tls-type", self.tls.type.value if self.tls.type else None),
                ("tls-hostname", self.tls.hostname),
                ("tls-verify-peer", None if self.tls.verify_peer else "0"),
                ("tls-certificates", self.tls.certificates),
                ("tls-psk-file", self.tls.psk_file),
            ]
        return [(key, value) for key, value in found if value is not None]


def parse_uri(text: str) -> NbdUri:
    """Parse the address of an export to connect to.

    Raises UsageError, in one line, for anything that is not one of the forms above.
    """
    uri = _parse(text, default_host="localhost")
    if uri.socket is None and not uri.port:
        raise UsageError(f"{text!r}: nothing can be reached at port 0")
    return uri


def parse_listen_uri(text: str) -> NbdUri:
    """Parse an address to listen on: no export name; no host means every address, port 0 any free port.

    Raises UsageError, in one line, for anything else.
    """
    uri = _parse(text, default_host="")
    if uri.export:
        raise UsageError(f"{text!r}: an address to listen on has no export name; leave out {uri.export!r}")
    return uri


def is_ipv6(text: str) -> bool:
    """Tell whether this is an IPv6 address; behind ``%`` it may name an interface, as link-local ones do."""
    address, percent, zone = text.partition("%")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return not percent or _ZONE.fullmatch(zone) is not None


def is_host_name(text: str) -> bool:
    """Tell whether a name can be looked up: no part of it, between dots, is empty or too long."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def _parse(text: str, default_host: str) -> NbdUri:
    try:
        text.encode()
    except UnicodeError as error:
        raise UsageError(f"{text!r}: an NBD address is UTF-8") from error
    match = _URI.fullmatch(text)
    if match and match[1].lower() in _SCHEMES:
        return _parse_uri(text, match, default_host)
    if text.startswith("nbd:") and not match:
        return _parse_legacy(text)
    raise UsageError(f"{text!r} is not an NBD address; {ACCEPTED}")


def _parse_uri(text: str, match: re.Match[str], default_host: str) -> NbdUri:
    """Take an RFC 3986 URI of a known scheme apart."""
    scheme, authority, path, query, fragment = match.groups()
    if _UNPRINTABLE.search(text):
        raise UsageError(f"{text!r}: a URI holds no spaces or control characters; write a space as %20")
    if fragment is not None:
        raise UsageError(f"{text!r}: an NBD URI has no fragment; write # in an export name as %23")
    over_unix, over_tls = _SCHEMES[scheme.lower()]
    user, host, port = _split_authority(text, authority)
    parameters = _split_query(text, query or "")
    socket = parameters.pop("socket", None)
    export = _checked_export(text, _decoded(text, (path or "/")[1:]))
    if over_unix != (socket is not None):
        raise UsageError(f"{text!r}: " + ("say which socket, ?socket=PATH" if over_unix else
                         f"a socket belongs to {scheme}+unix:///EXPORT?socket=PATH"))  # fmt: skip
    tls = _tls(text, parameters, over_tls, scheme)
    if socket is not None:
        if host or port is not None:
            raise UsageError(
                f"{text!r}: a Unix socket has no host or port; write {scheme}:///EXPORT?socket=PATH"
            )
        return NbdUri(socket=_checked_socket(text, socket), export=export, tls=tls, user=user)
    return NbdUri(host or default_host, DEFAULT_PORT if port is None else port, None, export, tls, user)


def _parse_legacy(text: str) -> NbdUri:
    """Take QEMU's ``nbd:...`` apart. Nothing in it is percent-encoded; the first ``:exportname=`` counts."""
    address, _, export = text.removeprefix("nbd:").partition(":exportname=")
    export = _checked_export(text, export)
    if address.startswith("unix:"):
        return NbdUri(socket=_checked_socket(text, address.removeprefix("unix:")), export=export)
    match = _LEGACY_TCP.fullmatch(address)
    if not match or not match[1]:
        raise UsageError(
            f"{text!r}: write nbd:HOST:PORT[:exportname=EXPORT] or nbd:unix:PATH[:exportname=EXPORT]"
        )
    return NbdUri(_checked_host(text, match[1]), _checked_port(text, match[2]), export=export)


def _split_authority(text: str, authority: str) -> tuple[str | None, str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if not match:
        raise UsageError(
            f"{text!r}: {authority!r} is not HOST or HOST:PORT; write an IPv6 address in brackets"
        )
    user, host, port = match.groups()
    if user is not None and ":" in user:
        raise UsageError(f"{text!r}: NBD has no passwords; leave out what follows the user's name")
    if user is not None:
        user = _decoded(text, user)
        if not user or _UNPRINTABLE.search(user):
            raise UsageError(f"{text!r}: {user!r} is not a user's name")
    return user, _checked_host(text, _decoded_host(text, host)), _checked_port(text, port) if port else None


def _decoded_host(text: str, host: str) -> str:
    """Undo percent-encoding; a zone, ``[fe80::1%25eth0]`` in RFC 6874, may also stand behind a bare %."""
    address, percent, zone = host.removesuffix("]").partition("%")
    if not host.startswith("[") or not percent:
        return _decoded(text, host)
    # Interface 25 is one, too.
    return f"{address}%{_decoded(text, zone[2:]) if zone.startswith('25') and zone != '25' else zone}]"


def _split_query(text: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        quoted, equals, value = item.partition("=")
        key = _decoded(text, quoted)
        if key not in (
            "socket",
            "tls-type",
            "tls-hostname",
            "tls-verify-peer",
            "tls-certificates",
            "tls-psk-file",
        ):
            raise UsageError(
                f"{text!r}: unknown parameter {key!r}; known are socket, tls-type, tls-hostname, "
                "tls-verify-peer, tls-certificates and tls-psk-file"
            )
        if key in parameters:
            raise UsageError(f"{text!r}: {key} is given twice")
        if not equals or not value:
            raise UsageError(f"{text!r}: {key} has no value; write {key}=VALUE")
        parameters[key] = _decoded(text, value)
    return parameters


def _tls(text: str, parameters: dict[str, str], over_tls: bool, scheme: str) -> Tls | None:
    for key, value in parameters.items():
        if not over_tls:
            raise UsageError(f"{text!r}: {key} has no effect without TLS; write nbds{scheme.lower()[3:]}://")
        if "\0" in value:
            raise UsageError(f"{text!r}: {key} holds a NUL")
    if not over_tls:
        return None
    kind, verify = parameters.get("tls-type"), parameters.get("tls-verify-peer", "1")
    if kind not in (None, "anon", "x509", "psk"):
        raise UsageError(f"{text!r}: tls-type is anon, x509 or psk, not {kind!r}")
    if verify not in ("0", "1"):
        raise UsageError(f"{text!r}: tls-verify-peer is 0 or 1, not {verify!r}")
    return Tls(
        type=TlsType(kind) if kind else None,
        hostname=parameters.get("tls-hostname"),
        verify_peer=verify == "1",
        certificates=parameters.get("tls-certificates"),
        psk_file=parameters.get("tls-psk-file"),
    )


def _decoded(text: str, part: str) -> str:
    """Undo percent-encoding; the bytes behind it must be UTF-8."""
    if bad := _BAD_PERCENT.search(part):
        raise UsageError(
            f"{text!r}: {part[bad.start() :][:3]!r} is not a percent-encoded byte; write % as %25"
        )
    try:
        return unquote_to_bytes(part.encode()).decode()
    except UnicodeError as error:
        raise UsageError(f"{text!r}: {part!r} is not UTF-8 when decoded") from error


def _checked_host(text: str, host: str) -> str:
    if not host.startswith("["):
        wrong = _UNPRINTABLE.search(host) or set(host) & set("/?#@:[]")
        if wrong or not is_host_name(host):
            raise UsageError(f"{text!r}: {host!r} is not a host's name or address")
        return host
    if not is_ipv6(host[1:-1]):
        raise UsageError(f"{text!r}: {host!r} is not an IPv6 address")
    return host[1:-1]


def _checked_port(text: str, port: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{text!r}: {port!r} is not a port; use a number from 1 to 65535")
    return int(port)


def _checked_export(text: str, export: str) -> str:
    length = len(export.encode())
    if "\0" in export:
        raise UsageError(f"{text!r}: an export name holds no NUL")
    if length > EXPORT_NAME_LIMIT:
        raise UsageError(
            f"the export name {export[:40]!r}... has {length} bytes; {EXPORT_NAME_LIMIT} are allowed"
        )
    return export


def _checked_socket(text: str, path: str) -> str:
    if not path or path == "\0" or "\0" in path[1:]:
        raise UsageError(f"{text!r}: {path!r} is not the path of a Unix socket")
    length = len(path.encode())
    if length > SOCKET_PATH_LIMIT:
        raise UsageError(f"{text!r}: the socket's path has {length} bytes; {SOCKET_PATH_LIMIT} are possible")
    return path
