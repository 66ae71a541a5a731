"""What an operator does to a migration while it runs, and what it says then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.processes import run, wait_until
from tests.support.vms import NBD_MIGRATE, TwoMonitors, monitor, running

SECONDS = 60.0
SLOW = 1 << 14
"""Bytes per second: at this rate the RAM of the guest takes many minutes."""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMonitors]:
    """A guest that runs on A, whose QEMU has a second monitor, and a journal of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "hosts"
    directory.mkdir()
    made = TwoMonitors(directory)
    with running(made):
        yield made


def throttle(stage: TwoMonitors, bytes_per_second: int = SLOW) -> None:
    """The RAM moves at this rate; what little is left of it must be little indeed for the switch-over."""
    with monitor(stage.second) as a:
        a.execute("migrate-set-parameters", max_bandwidth=bytes_per_second, downtime_limit=1)


def wait_until_ram_moves(stage: TwoMonitors) -> None:
    """The migration is under way on A."""
    with monitor(stage.second) as a:
        wait_until(lambda: a.execute("query-migrate").get("status") == "active", "the RAM moves", SECONDS)


def status(*options: str) -> str:
    """What ``nbd-migrate status`` says of the migration."""
    done = run(NBD_MIGRATE, "status", "a", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_guest_that_was_paused_on_a_is_said_to_be_paused_on_b(stage: TwoMonitors) -> None:
    throttle(stage)
    with stage.run() as migration:
        wait_until_ram_moves(stage)
        with monitor(stage.second) as a:
            a.execute("stop")
        throttle(stage, 1 << 30)
        assert migration.wait(SECONDS) == 0
    cont = (
        "the guest came to B paused, as it was on A; its disk follows; to let it run: "
        f"nbd-migrate qmp {stage.monitor_b} cont"
    )
    assert cont in migration.output()
    assert cont in status()
    assert journal.last("a").phase is Phase.DONE
    assert run(NBD_MIGRATE, *cont.split()[-3:]).returncode == 0
    stage.wait_until_guest_works("b")
