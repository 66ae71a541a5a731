"""Which addresses may connect."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from nbdserve.errors import UsageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AllowList:
    """Networks whose hosts may connect; an empty list lets everyone in."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)

    def admits(self, host: str) -> bool:
        """Whether a client with this address, as the kernel tells it, may connect."""
        if not self._networks:
            return True
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            # So an IPv4 client shows on a socket that serves both kinds.
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def parse_network(text: str) -> Network:
    """Read ``192.0.2.0/24``, ``2001:db8::/32`` or a single address; UsageError when it is none of those."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise UsageError(
            f"--allow {text}: {error}: write a network, such as 192.0.2.0/24, or an address"
        ) from error
