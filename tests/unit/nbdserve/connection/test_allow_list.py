"""Which addresses may connect."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from nbdserve.connection.allow_list import AllowList, parse_network


@pytest.mark.parametrize(
    ("networks", "host", "admitted"),
    [
        ([], "203.0.113.9", True),
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.3.0", False),
        (["192.0.2.7"], "192.0.2.7", True),
        (["192.0.2.7"], "192.0.2.8", False),
        (["192.0.2.0/24", "2001:db8::/32"], "2001:db8:ffff::1", True),
        (["192.0.2.0/24"], "2001:db8::1", False),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["192.0.2.0/24"], "::ffff:192.0.2.1", True),
        (["::/0"], "::ffff:192.0.2.1", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["fe80::1%eth0"], "fe80::1%eth0", True),
        (["fe80::1%eth0"], "fe80::1%eth1", False),
        (["fe80::%eth0/64"], "fe80::ff%eth0", True),
        (["fe80::%eth0/64"], "fe80::ff%eth1", False),
        (["0.0.0.0/0"], "203.0.113.9", True),
    ],
)
def test_a_host_in_any_of_the_networks_is_admitted(networks: list[str], host: str, admitted: bool) -> None:
    assert AllowList(parse_network(text) for text in networks).admits(host) == admitted


ZONELESS = [
    "fe80::1%",
    "2001:db8::1%eth0",
    "192.0.2.1%eth0",
    "fe80::1%a b",
    "fe80::/64%eth0",
    "fe80::1%eth0/x",
]


@pytest.mark.parametrize(
    "text", ["", "localhost", "192.0.2.1/24", "192.0.2.0/33", "10.0.0", "::1/129", *ZONELESS]
)
def test_what_is_no_network_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="--allow " + text):
        parse_network(text)
