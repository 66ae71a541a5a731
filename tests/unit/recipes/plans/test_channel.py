"""How disk and RAM travel, as a plan says it."""

from __future__ import annotations

from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from recipes.cli.main import make_parser, overrides
from recipes.migrate.state import Disk, State
from recipes.plans.planfile import build
from recipes.plans.sockets import sockets_of_channel

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


def test_one_connection_goes_to_where_b_would_listen_for_the_ram() -> None:
    single = plan(channel={"kind": "single"})
    assert single.channel.address == "tcp:[fe80::2%eth0]:4444"
    assert single.ram_host == "fe80::2%eth0"
    assert single.ends_on_b == ("/b.raw.export", "/b.raw.ram")
    assert single.export.address.export == "vm"
    assert (single.disk_over_tls, single.ram_over_tls, single.all_over_tls) == (False, False, True)
    assert State.from_json(State("vm", single, disks=(Disk("/a.raw", "/b.raw", 1),)).to_json()).plan == single


def test_one_connection_may_have_an_address_of_its_own() -> None:
    there = {"kind": "single", "address": "tcp:b.example:9"}
    own = plan(channel=there, destination={"migration": "unix:/run/ram"})
    assert (own.way_to_b, own.ends_on_b) == ("tcp:b.example:9", ("/b.raw.export", "/run/ram"))
    with pytest.raises(UsageError, match=r"^channel.address: destination.migration says tcp:\[fe80"):
        plan(channel=there)
    with pytest.raises(UsageError, match=r"^channel.address: 'b.example' is not usable: write tcp:HOST:PORT"):
        plan(channel={"kind": "single", "address": "b.example"})
    with pytest.raises(UsageError, match=r"^channel.address: this is for channel.kind = 'single'"):
        plan(channel={"kind": "plain", "address": "tcp:b.example:9"})


def test_on_one_machine_the_one_connection_is_a_socket_too_and_not_encrypted() -> None:
    local = {"export": {"uri": "nbd+unix:///vm?socket=/run/nbd"}, "destination": {"migration": "unix:/run/m"}}
    single = plan(channel={"kind": "single"}, **local)
    assert (single.way_to_b, single.ends_on_b) == ("unix:/b.raw.channel", ("/run/nbd", "/run/m"))
    assert (single.all_over_tls, single.has_secrets, single.ram_host) == (False, True, "")
    assert sockets_of_channel(single) == ["/run/nbd", "/b.raw.channel.qmp", "/b.raw.channel"]
    with pytest.raises(UsageError, match=r"^destination.image: /b*.channel.qmp has 1"):
        plan(channel={"kind": "single"}, destination={"image": f"/{'b' * 101}"})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tcp", r"^channel.kind: 'tcp' is called 'plain' now"),
        ("x", r"^channel.kind: 'x' is none: write tls, plain, ssh or single"),
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
