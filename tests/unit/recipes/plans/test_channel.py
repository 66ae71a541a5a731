"""How disk and RAM travel, as a plan says it."""

from __future__ import annotations

from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from recipes.cli.main import make_parser, overrides
from recipes.plans.planfile import build

BASE: dict[str, Any] = {
    "source": {"qmp": "/run/a.qmp", "image": "/a.raw"},
    "export": {"uri": "nbd://192.0.2.1/vm"},
    "destination": {
        "qemu": ["qemu"], "image": "/b.raw", "qmp": "/run/b.qmp", "migration": "tcp:[fe80::2%eth0]:4444",
    },
}  # fmt: skip


def plan(**sections: Any) -> Any:
    """The plan with changes."""
    return build({name: {**values, **sections.get(name, {})} for name, values in BASE.items()},
                 {"channel": sections.get("channel", {})})  # fmt: skip


def test_without_a_word_all_that_crosses_a_network_goes_over_tls() -> None:
    assert plan().disk_over_tls
    assert plan().ram_over_tls
    assert plan().ram_host == "fe80::2%eth0"
    assert plan(destination={"migration": "tcp:b.example:1"}).ram_host == "b.example"


def test_unix_sockets_need_none() -> None:
    local = plan(export={"uri": "nbd+unix:///vm?socket=/run/nbd"}, destination={"migration": "unix:/run/m"})
    assert not local.disk_over_tls
    assert not local.ram_over_tls
    assert local.ram_host == ""


def test_plain_must_be_asked_for() -> None:
    plain = plan(channel={"kind": "plain"})
    assert not plain.disk_over_tls
    assert not plain.ram_over_tls


def test_through_ssh_everything_is_a_socket_on_b_whatever_the_plan_says() -> None:
    b = {"destination": {"host": "ssh://b"}, "channel": {"kind": "ssh"}}
    tunnelled = plan(**b)
    assert (tunnelled.disk_over_tls, tunnelled.ram_over_tls, tunnelled.ram_host) == (False, False, "")
    assert tunnelled.ends_on_b == ("/b.raw.export", "/b.raw.ram")
    assert tunnelled.export.address.export == "vm"
    own = plan(**b | {"export": {"uri": "nbd+unix:///vm?socket=/run/nbd"}})
    assert own.ends_on_b == ("/run/nbd", "/b.raw.ram")


def test_through_ssh_needs_a_host_that_is_reached_by_it() -> None:
    with pytest.raises(UsageError, match=r"^channel.kind: by ssh neither host is reached; say source"):
        plan(channel={"kind": "ssh"})
    long = {"host": "ssh://b", "image": f"/{'b' * 101}"}
    with pytest.raises(UsageError, match=r"^destination.image: /b*.export.take has 114 bytes"):
        plan(channel={"kind": "ssh"}, destination=long)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tcp", r"^channel.kind: 'tcp' is called 'plain' now"),
        ("x", r"^channel.kind: 'x' is none: write tls, plain or ssh"),
    ],
)
def test_other_words_are_refused(kind: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(channel={"kind": kind})


def test_the_command_line_names_the_channel_and_the_hosts() -> None:
    words = ["run", "--from", "ssh://a", "--to", "ssh://root@b:2222", "--channel", "plain", "plan.toml"]
    found = overrides(make_parser().parse_args(words))
    assert found["channel"] == {"kind": "plain"}
    assert found["source"] == {"host": "ssh://a"}
    assert found["destination"] == {"host": "ssh://root@b:2222"}


def test_two_hosts_may_call_their_monitors_the_same() -> None:
    source, destination = ({"qmp": "/run/vm.qmp", "host": f"ssh://{name}"} for name in ("a", "b"))
    assert plan(source=source, destination=destination)
    with pytest.raises(UsageError, match=r"^destination.qmp: /run/vm.qmp is the source's monitor$"):
        plan(source={**source, "host": ""}, destination={**destination, "host": ""})


@pytest.mark.parametrize("section", ["source", "destination"])
def test_a_host_is_an_address_or_a_prefix(section: str) -> None:
    with pytest.raises(UsageError, match=rf"^{section}.host: 'b' is not usable: write ssh://"):
        plan(**{section: {"host": "b"}})
    with pytest.raises(UsageError, match=rf"^{section}.shell: {section}.host says already"):
        plan(**{section: {"host": "ssh://b", "shell": ["sudo"]}})
