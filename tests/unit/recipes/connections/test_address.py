"""Addresses of hosts."""

from __future__ import annotations

import subprocess

import pytest

from nbdserve.common.errors import UsageError
from recipes.connections.address import check_host, host_in, ssh_words
from recipes.hosts.ssh import with_options


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
        "ssh://b..c",
        "ssh://b,c",
        "ssh://\u00fc",
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^source.host: .*; write |^source.host: .*: write ") as caught:
        check_host("source.host", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ssh://b.example", ("ssh://b.example",)),
        ("ssh://root@b_1.example:2222/", ("ssh://root@b_1.example:2222/",)),
        ("ssh://[2001:db8::1]", ("2001:db8::1",)),
        ("ssh://[2001:db8::1]:2222", ("-p", "2222", "2001:db8::1")),
        ("ssh://root@[fe80::1%eth0]:22", ("-p", "22", "root@fe80::1%eth0")),
    ],
)
def test_an_address_is_said_as_openssh_takes_it(text: str, words: tuple[str, ...]) -> None:
    """It refuses an IPv6 address in a URI, with its usage."""
    check_host("source.host", text)
    assert ssh_words(text) == words
    assert with_options(("ssh", *words), ["-v"]) == ["ssh", *words[:-1], words[-1], "-v"]
    done = subprocess.run(["ssh", "-F", "none", "-G", *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, f"hostname {host_in(text)}\n" in done.stdout) == (0, True), done.stderr
