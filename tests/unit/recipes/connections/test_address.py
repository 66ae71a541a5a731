"""Addresses of hosts."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.connections.address import check_host, host_in


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("ssh://b", "b"),
        ("ssh://b.example/", "b.example"),
        ("ssh://root@b.example:2222", "b.example"),
        ("ssh://a-b_c@192.0.2.1", "192.0.2.1"),
        ("ssh://[2001:db8::1]:22", "2001:db8::1"),
        ("ssh://root@[fe80::1%eth0]", "fe80::1%eth0"),
    ],
)
def test_an_address_names_a_host(text: str, host: str) -> None:
    check_host("source.host", text)
    assert host_in(text) == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b.example",
        "ssh://",
        "ssh://root@",
        "ssh://-oProxyCommand=x",
        "ssh://-x@b",
        "ssh://root:secret@b",
        "ssh://b/path",
        "ssh://b?x=y",
        "ssh://b:",
        "ssh://b:0",
        "ssh://b:65536",
        "ssh://b:22:22",
        "ssh://[b]",
        "ssh://2001:db8::1",
        "ssh://b c",
        "ssh://b\nc",
        "SSH://b",
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^source.host: .*; write |^source.host: .*: write ") as caught:
        check_host("source.host", text)
    assert "\n" not in str(caught.value)
