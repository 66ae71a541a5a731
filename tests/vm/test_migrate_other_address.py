"""Host A comes back under another address while the guest on B needs its disk: nothing but time is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.migrate import journal
from recipes.migrate.state import Phase
from recipes.plans.channel import PLAIN, SSH, TLS
from tests.support.apart import ADDRESSES, LONG, apart, server
from tests.support.disks import MIB
from tests.support.processes import check

OLD, NEW = ADDRESSES["a"], "10.99.0.7"
ADVICE = re.compile(r"under another address: nbd-migrate (resume \S+ --source-address) HOST")
SOON = 6.0
"""Seconds after which the run gives up."""


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is known of the migration here."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def give_another_address(namespace: str) -> None:
    """As DHCP does; with the first address of a network its others would go."""
    there = ("ip", "-n", namespace, "address")
    check(*there, "del", f"{OLD}/24", "dev", "eth0")
    check(*there, "add", f"{NEW}/24", "dev", "eth0")


@pytest.mark.parametrize("kind", [TLS, PLAIN, SSH])
def test_a_host_that_comes_back_under_another_address_is_told_and_the_guest_notices_nothing(
    tmp_path: Path, kind: str
) -> None:
    # Else a session of ssh to the old address lasts as long as its TCP connection, and with it what it runs.
    with apart(tmp_path, "ClientAliveInterval 2") as stage:
        stage.change("channel", kind=kind)
        stage.change("limits", speed=4 * MIB, recover=SOON, stall=SOON, connect=5.0, command=15.0)
        with stage.run() as migration:
            migration.wait_for_line(" of 64 MiB", LONG)
            give_another_address(stage.net.name("a"))
            known = tmp_path / "known_hosts"
            known.write_text(known.read_text() + f"{NEW} {(tmp_path / 'host_key.pub').read_text()}")
            assert migration.wait(LONG) == 1, migration.output()
        found = ADVICE.search(migration.output().splitlines()[-1])
        assert found, migration.output()
        with (
            server(tmp_path, stage.net, "a", (), address=NEW),
            stage.migrate(*found[1].split(), NEW, log="resume.log") as resumed,
        ):
            assert resumed.wait(LONG) == 0, resumed.output()
        state = journal.last("a")
        assert state.phase is Phase.DONE
        assert NEW in state.plan.source.host
        assert state.finish == "nbd-migrate resume a", "the plan's file has the old address"
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors(interrupted=True) == []
