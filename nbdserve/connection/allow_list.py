"""Which addresses may connect."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import is_ipv6


@dataclass(frozen=True)
class Network:
    """Addresses, and for link-local ones maybe the interface behind which they are."""

    addresses: ipaddress.IPv4Network | ipaddress.IPv6Network
    zone: str = ""

    def admits(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, zone: str) -> bool:
        """Tell whether a host is one of them."""
        return address in self.addresses and self.zone in ("", zone)


class AllowList:
    """Networks whose hosts may connect; an empty list lets everyone in."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)

    def admits(self, host: str) -> bool:
        """Tell whether a client with this address, as the kernel tells it, may connect."""
        if not self._networks:
            return True
        text, _, zone = host.partition("%")
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            # So an IPv4 client shows on a socket that serves both kinds.
            address = address.ipv4_mapped
        return any(network.admits(address, zone) for network in self._networks)


def parse_network(text: str) -> Network:
    """Read ``192.0.2.0/24``, ``2001:db8::1``, ``fe80::1%eth0``, ``fe80::%eth0/64``; UsageError otherwise."""
    address, slash, length = text.partition("/")
    address, percent, zone = address.partition("%")
    try:
        addresses = ipaddress.ip_network(f"{address}{slash}{length}")
    except ValueError as error:
        raise UsageError(
            f"--allow {text}: {error}: write a network, such as 192.0.2.0/24, or an address"
        ) from error
    if percent and not (is_ipv6(f"{address}%{zone}") and addresses.is_link_local):
        raise UsageError(
            f"--allow {text}: only a link-local IPv6 address has an interface, as in fe80::1%eth0"
        )
    return Network(addresses, zone)
