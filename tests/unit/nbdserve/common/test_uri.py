"""NBD addresses, against the examples of the NBD project's doc/uri.md and QEMU's ``nbd:`` strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import DEFAULT_PORT, NbdUri, Tls, TlsType, parse_listen_uri, parse_uri


@pytest.mark.parametrize(
    ("text", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/a/b/c", "a/b/c"),
        ("nbd://example.com/100%25", "100%"),
        ("nbd://example.com/a%3Fb%23c", "a?b#c"),
        ("nbd:example.com:10809:exportname=a:b%20c", "a:b%20c"),
        ("nbd:unix:/run/a.sock:exportname=/x", "/x"),
        ("nbd:example.com:1:exportname=", ""),
    ],
)
def test_the_export_name_is_the_path_without_its_first_slash(text: str, export: str) -> None:
    assert parse_uri(text).export == export


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://h", NbdUri("h", DEFAULT_PORT)),
        ("NBD://h:1/", NbdUri("h", 1)),
        ("nbd+tcp://h:1/", NbdUri("h", 1)),
        ("nbd://[::1]:7/x", NbdUri("::1", 7, export="x")),
        ("nbd://[fe80::1%25eth0]/", NbdUri("fe80::1%eth0")),
        ("nbd://[fe80::1%eth0]:7/x", NbdUri("fe80::1%eth0", 7, export="x")),
        ("nbd://[fe80::1%ee0]", NbdUri("fe80::1%ee0")),
        ("nbd://[fe80::1%2]", NbdUri("fe80::1%2")),
        ("nbd://[fe80::1%25]", NbdUri("fe80::1%25")),
        ("nbd://[fe80::1%2525]", NbdUri("fe80::1%25")),
        ("nbd://[fe80::1%25br%2Dlan]", NbdUri("fe80::1%br-lan")),
        ("nbd:[fe80::1%eth0]:99", NbdUri("fe80::1%eth0", 99)),
        ("nbd:///x", NbdUri("localhost", DEFAULT_PORT, export="x")),
        ("nbd:127.0.0.1:99", NbdUri("127.0.0.1", 99)),
        ("nbd:[::1]:99:exportname=d", NbdUri("::1", 99, export="d")),
        ("nbd:unix:/a b:c", NbdUri(socket="/a b:c")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket="\0/abstract")),
        ("nbds://h/", NbdUri("h", tls=Tls())),
        (
            "nbds://alice@h:2/d?tls-type=psk&tls-psk-file=/k%20ey",
            NbdUri("h", 2, None, "d", Tls(TlsType.PRE_SHARED_KEY, psk_file="/k ey"), "alice"),
        ),
        (
            "nbds+unix:///d?socket=/s&tls-hostname=a.b&tls-verify-peer=0&tls-certificates=/pki",
            NbdUri(socket="/s", export="d", tls=Tls(None, "a.b", False, "/pki")),
        ),
    ],
)
def test_every_form_of_address_is_understood(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not an NBD address"),
        ("/dev/sda", "not an NBD address"),
        ("http://h/", "not an NBD address"),
        ("nbd+vsock://2/", "not an NBD address"),
        ("migrate:disk", "not an NBD address; use nbd://"),
        ("nbd:", "write nbd:HOST:PORT"),
        ("nbd:h", "write nbd:HOST:PORT"),
        ("nbd::1", "write nbd:HOST:PORT"),
        ("nbd:h:x", "is not a port"),
        ("nbd:unix:", "not the path of a Unix socket"),
        ("nbd://h:0/", "port 0"),
        ("nbd:h:0", "port 0"),
        ("nbd://h:65536/", "is not a port"),
        ("nbd://h:-1/", "is not a port"),
        ("nbd://::1/", "IPv6 address in brackets"),
        ("nbd://[::g]/", "is not an IPv6 address"),
        ("nbd://[fe80::1%]/", "is not an IPv6 address"),
        ("nbd://[fe80::1%25a%2Fb]/", "is not an IPv6 address"),
        ("nbd://[fe80::1%25a%00]/", "is not an IPv6 address"),
        ("nbd://[fe80::1%interface-too-long]/", "is not an IPv6 address"),
        ("nbd://[192.0.2.1%eth0]/", "is not an IPv6 address"),
        ("nbd:[fe80::1%a b]:99", "is not an IPv6 address"),
        ("nbd://h%2Fx/", "is not a host"),
        ("nbd://a..b/", "is not a host"),
        (f"nbd://{'x' * 64}/", "is not a host"),
        ("nbd://h/%zz", "not a percent-encoded byte"),
        ("nbd://h/%4", "not a percent-encoded byte"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/\udcff", "UTF-8"),
        ("nbd://h/%00", "no NUL"),
        ("nbd://h/a b", "%20"),
        ("nbd://h/a\n", "control characters"),
        ("nbd://h/a#b", "%23"),
        ("nbd://h/" + "x" * 4097, "4096 are allowed"),
        ("nbd://u:secret@h/", "no passwords"),
        ("nbd://@h/", "not a user's name"),
        ("nbd://h/?socket=/s", "nbd+unix"),
        ("nbd+unix:///d", "which socket"),
        ("nbd+unix:///d?socket=", "no value"),
        ("nbd+unix:///d?socket", "no value"),
        ("nbd+unix:///d?socket=a&socket=b", "given twice"),
        ("nbd+unix://h/d?socket=/s", "no host or port"),
        ("nbd+unix:///d?socket=/" + "s" * 107, "107 are possible"),
        ("nbd+unix:///d?socket=a%00b", "not the path of a Unix socket"),
        ("nbd://h/?tls-certificates=/pki", "nbds://"),
        ("nbd+unix:///?socket=/s&tls-type=x509", "nbds+unix://"),
        ("nbds://h/?tls-type=rot13", "anon, x509 or psk"),
        ("nbds://h/?tls-verify-peer=yes", "0 or 1"),
        ("nbds://h/?x-speed=1", "unknown parameter"),
    ],
)
def test_a_malformed_address_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_uri(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_to_listen_on_may_leave_out_the_host_and_the_port() -> None:
    assert parse_listen_uri("nbd://") == NbdUri("", DEFAULT_PORT)
    assert parse_listen_uri("nbd://:0") == NbdUri("", 0)
    assert parse_listen_uri("nbd+unix:///?socket=/s").socket == "/s"
    with pytest.raises(UsageError, match="no export name"):
        parse_listen_uri("nbd://h/disk")


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        (NbdUri("h", 9), {"type": "inet", "host": "h", "port": "9"}),
        (NbdUri("::1", 9), {"type": "inet", "host": "::1", "port": "9"}),
        (NbdUri(socket="/s"), {"type": "unix", "path": "/s"}),
        (NbdUri(socket="\0s"), {"type": "unix", "path": "s", "abstract": True}),
    ],
)
def test_qemu_gets_the_server_as_a_socket_address(uri: NbdUri, server: dict[str, object]) -> None:
    assert uri.qemu_server() == server


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
paths = names.filter(lambda path: 0 < len(path.encode()) < 100)
files = st.none() | paths
tls = st.none() | st.builds(Tls, st.none() | st.sampled_from(TlsType), files, st.booleans(), files, files)
hosts = st.sampled_from(["h", "example.com", "127.0.0.1", "::1", "fe80::1%eth0"])
ports = st.integers(1, 65535)


@given(
    st.builds(NbdUri, hosts, ports, st.none(), names, tls)
    | st.builds(NbdUri, socket=paths, export=names, tls=tls)
)
def test_the_canonical_uri_means_the_same_address(uri: NbdUri) -> None:
    assert parse_uri(str(uri)) == uri


@given(
    st.text(max_size=60) | st.text("nbds+unix:/[]@?=&%#0aé \0", max_size=60).map(lambda tail: "nbd" + tail)
)
def test_text_is_either_an_address_or_refused_in_one_line(text: str) -> None:
    for parse in (parse_uri, parse_listen_uri):
        complaint = ""
        try:
            uri = parse(text)
        except UsageError as error:
            complaint = str(error)
        else:
            assert parse(str(uri)) == uri
        assert "\n" not in complaint
