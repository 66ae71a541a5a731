"""Before anything starts it is known whether each host reaches the other where the plan says."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.common import clock
from nbdserve.common.errors import ConnectError
from recipes.checks.reach import ask
from recipes.checks.reachable import check_reachable
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.apart import ADDRESSES, Network, network
from tests.support.processes import Process, check, run

A, B = ADDRESSES["a"], ADDRESSES["b"]
PLAN = Plan(
    Source(qmp="/run/a.qmp", image="/a.raw"),
    Export(uri=f"nbd://{A}:10809/vm"),
    Destination(qemu=("qemu-system-x86_64",), image="/b.raw", qmp="/run/b.qmp", migration=f"tcp:{B}:4444"),
    limits=Limits(connect=20.0),
)
SOON = 1.0
"""Seconds for one that is in vain."""


@pytest.fixture
def net() -> Iterator[Network]:
    """Three namespaces."""
    with network() as made:
        yield made


def checked(net: Network, plan: Plan = PLAN) -> str:
    """What is wrong, or nothing."""
    tools = str(Path(sys.executable).parent)
    hosts = (Host(name.upper(), tuple(net.on(name)), tools) for name in ("a", "b"))
    try:
        clock.run(check_reachable(plan, *hosts))
    except MigrationError as error:
        return str(error)
    return ""


def test_hosts_that_reach_each_other_are_told_so_and_keep_their_ports_free(net: Network) -> None:
    for _ in range(2):
        assert checked(net) == ""
    assert run(*net.on("a", "ss", "-Hltn")).stdout == ""


def test_a_host_that_lets_the_other_not_in_is_named_with_what_to_do(net: Network) -> None:
    soon = Plan(PLAN.source, PLAN.export, PLAN.destination, limits=Limits(connect=SOON))
    # Nothing of A's comes back to B: as behind a firewall that drops.
    check("ip", "-n", net.name("a"), "route", "add", "blackhole", B)
    said = checked(net, soon)
    assert said.startswith(f"export.uri: B does not reach A at {A}:10809 (")
    assert f"no answer from {A}:10809 within 1 s" in said
    assert said.endswith("let it in there, as in A's firewall, or write another address")
    assert "\n" not in said


def test_a_port_that_somebody_uses_and_an_address_that_is_none_are_named(
    net: Network, tmp_path: Path
) -> None:
    other = Destination(**{**vars(PLAN.destination), "migration": "tcp:10.99.0.77:4444"})
    said = checked(net, Plan(PLAN.source, PLAN.export, other, limits=PLAN.limits))
    assert said.startswith("destination.migration: ")
    assert "cannot listen at 10.99.0.77:4444: Cannot assign requested address; write an address of B" in said
    taken = [
        sys.executable,
        "-c",
        f"import socket, time; s = socket.create_server(({A!r}, 10809)); time.sleep(600)",
    ]
    with Process(net.on("a", *taken), tmp_path / "taken.log") as user:
        user.wait_for(lambda: run(*net.on("a", "ss", "-Hltn")).stdout, "somebody listens")
        said = checked(net)
    assert said.startswith("export.uri: ")
    assert f"cannot listen at {A}:10809: Address already in use; write an address of A and a port" in said
    assert "\n" not in said


def test_somebody_else_is_not_taken_for_the_other_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"220 mail.example ready\r\n")
                client.recv(100)

        thread = threading.Thread(target=greet)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(ConnectError, match=f"somebody else answers at 127.0.0.1:{port}"):
            ask("127.0.0.1", port, "x" * 16, 60)
        thread.join()
