"""The address of a host, ``ssh://[user@]host[:port]``, as OpenSSH itself takes it for a destination.

What it does not say (user, port, key, jump hosts) is what the operator's ssh configuration says of the host.
Beside it are those at which something listens, ``tcp:HOST:PORT`` or ``unix:/PATH``, as QEMU writes them.
"""

from __future__ import annotations

import re

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import is_host_name, is_ipv6

SCHEME = "ssh://"

_ADDRESS = re.compile(
    r"ssh://(?:([^\s@:/?#%-][^\s@:/?#%]*)@)?(?:\[([^\]\s]+)\]|([A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*))(?::([0-9]+))?/?"
)


def is_ssh(text: str) -> bool:
    """Tell whether this is meant to be such an address."""
    return text.startswith(SCHEME)


def check_host(where: str, text: str) -> None:
    """Raise UsageError unless this is the address of a host; ``where`` is what the message begins with."""
    match = _ADDRESS.fullmatch(text)
    if match is None or (match[2] and not is_ipv6(match[2])):
        raise UsageError(
            f"{where}: {text!r} is not usable: write ssh://[USER@]HOST[:PORT], with an IPv6 HOST in brackets"
        )
    if match[4] and not 0 < int(match[4]) < 65536:
        raise UsageError(f"{where}: {text!r}: {match[4]} is no port; write one of 1 to 65535")


def host_in(text: str) -> str:
    """Return the host's name, or its address, in an address that has been checked."""
    match = _ADDRESS.fullmatch(text)
    assert match
    return match[2] or match[3]


def with_host(text: str, host: str) -> str:
    """Return an address that has been checked with another host's name, or address, in it."""
    match = _ADDRESS.fullmatch(text)
    assert match
    user, _, _, port = match.groups()
    shown = f"[{host}]" if ":" in host else host
    return f"{SCHEME}{f'{user}@' if user else ''}{shown}{f':{port}' if port else ''}"


def ssh_words(text: str) -> tuple[str, ...]:
    """Return an address that has been checked as words of ssh's command line.

    OpenSSH (9.2) takes a name in its URI, and no IPv6 address: that is said by options.
    """
    match = _ADDRESS.fullmatch(text)
    assert match
    user, address, _, port = match.groups()
    if not address:
        return (text,)
    return (*(("-p", port) if port else ()), f"{user}@{address}" if user else address)


def host_and_port(address: str) -> tuple[str, int]:
    """Take ``HOST:PORT`` apart; an IPv6 host may stand in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_host_and_port(text: str) -> bool:
    """Tell whether the text is ``HOST:PORT`` with a port of 1 to 65535; an IPv6 host stands in brackets.

    A link-local one names its interface, ``[fe80::1%eth0]:4444``.
    """
    match = re.fullmatch(r"(?:\[([^\]]*)\]|[^\s:\[\]/@]+):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        return False
    return is_host_name(text.rpartition(":")[0]) if match[1] is None else is_ipv6(match[1])


def check_listening(where: str, text: str) -> None:
    """Raise UsageError unless this is ``tcp:HOST:PORT`` or ``unix:/PATH``; a socket's path is not long."""
    kind, _, rest = text.partition(":")
    if not ((kind == "unix" and rest.startswith("/")) or (kind == "tcp" and is_host_and_port(rest))):
        raise UsageError(f"{where}: {text!r} is not usable: write tcp:HOST:PORT or unix:/PATH")
    if kind == "unix":
        check_socket_path(rest, where)
