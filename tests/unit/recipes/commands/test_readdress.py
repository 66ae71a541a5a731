"""What a plan says of A when A has another address, and what nothing can be changed in."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common import clock
from nbdserve.common.errors import UsageError
from recipes.commands.readdress import at_address, move_source
from recipes.errors import MigrationError
from recipes.migrate.journal import Journal, last
from recipes.migrate.progress import Report
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.channel import SINGLE, SSH, Channel
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source

PLAN = Plan(
    Source(qmp="/a.qmp", host="ssh://root@10.0.0.1:2222"),
    Export(uri="nbd://10.0.0.1:10809/vm"),
    Destination(qemu=("qemu",), qmp="/b.qmp", migration="tcp:10.0.0.2:4444"),
    disk=(PlannedDisk("/images/a", "/images/b", "disk0"),),
)
SOCKETS = replace(
    PLAN,
    export=Export(uri="nbd+unix:///vm?socket=/images/b.export"),
    destination=replace(PLAN.destination, migration="unix:/images/b.ram"),
)


@pytest.mark.parametrize(
    ("host", "uri", "ssh"),
    [
        ("10.0.0.9", "nbd://10.0.0.9:10809/vm", "ssh://root@10.0.0.9:2222"),
        ("a.example", "nbd://a.example:10809/vm", "ssh://root@a.example:2222"),
        ("fd00::9", "nbd://[fd00::9]:10809/vm", "ssh://root@[fd00::9]:2222"),
    ],
)
def test_all_that_names_the_old_address_names_the_new_one(host: str, uri: str, ssh: str) -> None:
    moved = at_address(PLAN, host)
    assert (moved.export.uri, moved.source.host) == (uri, ssh)
    moved.source.check()
    moved.export.check()
    assert replace(moved, export=PLAN.export, source=PLAN.source) == PLAN


def test_a_monitor_at_the_old_address_is_at_the_new_one() -> None:
    plan = replace(PLAN, source=Source(qmp="10.0.0.1:4000"))
    assert at_address(plan, "fd00::9").source.qmp == "[fd00::9]:4000"
    elsewhere = replace(PLAN, source=Source(qmp="127.0.0.1:4000"))
    assert at_address(elsewhere, "10.0.0.9").source.qmp == "127.0.0.1:4000"


def test_another_name_of_a_in_the_configuration_of_ssh_is_the_operators() -> None:
    plan = replace(PLAN, source=replace(PLAN.source, host="ssh://store"))
    moved = at_address(plan, "10.0.0.9")
    assert (moved.source.host, moved.export.address.host) == ("ssh://store", "10.0.0.9")


def test_through_sockets_it_is_ssh_that_leads_to_the_new_address() -> None:
    for kind in (SSH, SINGLE):
        moved = at_address(replace(SOCKETS, channel=Channel(kind)), "10.0.0.9")
        assert (moved.source.host, moved.export) == ("ssh://root@10.0.0.9:2222", SOCKETS.export)


def test_the_same_address_once_more_is_no_mistake() -> None:
    moved = at_address(PLAN, "10.0.0.9")
    assert at_address(moved, "10.0.0.9") == moved


@pytest.mark.parametrize("host", ["", "10.0.0.9:22", "ssh://a", "a b", "-x", "root@a"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="is no host"):
        at_address(PLAN, host)


def test_where_nothing_names_an_address_that_is_said() -> None:
    alone = replace(SOCKETS, source=Source(qmp="/a.qmp"))
    with pytest.raises(UsageError, match="A is reached by no address"):
        at_address(alone, "10.0.0.9")
    with pytest.raises(UsageError, match="A connects to B by itself"):
        at_address(replace(alone, channel=Channel(SINGLE)), "10.0.0.9")


def test_where_b_s_qemu_is_connected_itself_it_is_refused_with_what_helps() -> None:
    plan = replace(PLAN, destination=replace(PLAN.destination, engine="qemu"))
    with pytest.raises(UsageError, match=r"give A 10\.0\.0\.1 back"):
        at_address(plan, "10.0.0.9")


@pytest.mark.parametrize("phase", [Phase.EXPORT, Phase.MIGRATE, Phase.COMPLETE, Phase.DONE])
def test_an_address_is_for_a_guest_that_is_on_b_and_needs_a(
    phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = State("vm", PLAN, phase, disks=(Disk("/images/a", "/images/b", 1 << 20),))
    with closing(Journal.begin("vm")) as journal:
        journal.append(state)
    with pytest.raises(MigrationError, match="is for a guest that is on B while its disk follows"):
        clock.run(move_source("vm", "10.0.0.9", Report()))
    assert last("vm").plan == PLAN


def test_where_nobody_answers_at_the_new_address_nothing_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    plan = replace(PLAN, source=Source(qmp="/a.qmp", shell=("false",)))
    state = State("vm", plan, Phase.STREAM, disks=(Disk("/images/a", "/images/b", 1 << 20),))
    with closing(Journal.begin("vm")) as journal:
        journal.append(state)
    with pytest.raises(MigrationError, match="false"):
        clock.run(move_source("vm", "10.0.0.9", Report()))
    assert last("vm").plan == plan
