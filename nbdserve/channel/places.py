"""What the operator names: where a channel is listened for or reached, its token, its certificates."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from nbdserve.channel.wire.greeting import LEAST_TOKEN
from nbdserve.common.errors import UsageError
from nbdserve.common.pem import load_identity, read_certificates
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import is_host_name, is_ipv6
from nbdserve.connection.listeners import Listener, listen_tcp, listen_unix
from nbdserve.service.certificates import Certificates, load

_MOST_TOKEN = 4096
_SSH = re.compile(
    r"ssh://(?:([^@/\s-][^@/\s]*)@)?(\[[^\]/\s]*\]|[^:/@\s\[\]-][^:/@\s\[\]]*)(?::([0-9]+))?(/.+)"
)


@dataclass(frozen=True)
class TcpPlace:
    """A host's port; no host is every address of this machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_here(self) -> bool:
        """Tell whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class UnixPlace:
    """The path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class SshPlace:
    """A Unix socket's path on another host, to which ssh leads."""

    user: str | None
    host: str
    port: int | None
    path: str

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{self.host}{port}{self.path}"


Place = TcpPlace | UnixPlace | SshPlace


def parse_place(text: str, option: str) -> Place:
    """Return the place in HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]/PATH; UsageError."""
    if not text.startswith("ssh://"):
        return _parse_local_place(text, option)
    match = _SSH.fullmatch(text)
    if match is None or not 0 < int(match[3] or 22) <= 65535:
        raise UsageError(
            f"{option} {text}: write ssh://[USER@]HOST[:PORT]/PATH, with the path of a socket there"
        )
    port = None if match[3] is None else int(match[3])
    path = check_socket_path(unquote(match[4]), option)
    return SshPlace(match[1], match[2].strip("[]"), port, path)


def _parse_local_place(text: str, option: str) -> TcpPlace | UnixPlace:
    if text.startswith("unix:"):
        return UnixPlace(check_socket_path(text.removeprefix("unix:"), option))
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    fair = is_ipv6(bare) if bare != host else ":" not in host and (not host or is_host_name(host))
    if not (colon and fair and re.fullmatch("[0-9]{1,5}", port) and int(port) <= 65535):
        raise UsageError(f"{option} {text}: write HOST:PORT, with an IPv6 address in brackets, or unix:PATH")
    return TcpPlace(bare, int(port))


def require_secrecy(place: Place, option: str, *, encrypted: bool) -> None:
    """UsageError for a place to which RAM and disks would go over a network as they are."""
    if isinstance(place, TcpPlace) and not encrypted and not place.is_here:
        raise UsageError(
            f"{option} {place}: without TLS only the loopback, a Unix socket or ssh:// is safe; "
            "give --tls-certificates"
        )


def listen(text: str, *, encrypted: bool, option: str = "--channel listen:") -> list[Listener]:
    """Listen at ``HOST:PORT`` or ``unix:PATH``.

    Raises UsageError for what is no such place, and for one that other machines reach where the channel is
    not ``encrypted``; ConnectError when nobody can listen there.
    """
    place = _parse_local_place(text, option)
    require_secrecy(place, option, encrypted=encrypted)
    if isinstance(place, UnixPlace):
        return [listen_unix(place.path)]
    return listen_tcp(place.host or None, place.port)


def read_token(path: Path) -> bytes:
    """Return the token in a file, at least 32 bytes, that only its owner may read. Raises UsageError."""
    try:
        # A pipe must not be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"--token-file {path}: not a regular file")
            if status.st_mode & 0o077:
                raise UsageError(f"--token-file {path}: others may read it: chmod 600 {path}")
            token = file.read(_MOST_TOKEN + 1).strip()
    except OSError as error:
        raise UsageError(f"--token-file {path}: {error.strerror}") from error
    if not LEAST_TOKEN <= len(token) <= _MOST_TOKEN:
        raise UsageError(
            f"--token-file {path}: {len(token)} bytes are no token: it has {LEAST_TOKEN} to {_MOST_TOKEN}; "
            f"make one by (umask 077; openssl rand -hex {LEAST_TOKEN} > {path})"
        )
    return token


def server_context(directory: Path) -> ssl.SSLContext:
    """Return TLS for the destination: ca-cert.pem, server-cert.pem, server-key.pem; the source is verified.

    Raises UsageError, as nbdserve does for its own certificates.
    """
    # Without it the system's authorities would count, where that is allowed: here it is not.
    read_certificates(directory / "ca-cert.pem")
    return load(Certificates.in_directory(directory, verify_peer=True)).context


def client_context(directory: Path) -> ssl.SSLContext:
    """Return TLS for the source: ca-cert.pem, client-cert.pem, client-key.pem; the destination is verified.

    Raises UsageError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata="\n".join(read_certificates(directory / "ca-cert.pem")))
    load_identity(context, directory / "client-cert.pem", directory / "client-key.pem")
    return context
