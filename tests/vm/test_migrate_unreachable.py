"""A host B that cannot be reached when a migration is given up: the guest's place is known all the same."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import TAG
from tests.support.processes import Process, run, wait_until
from tests.support.vms import Role, TwoMonitors, monitor, running

TOOLS = str(Path(sys.executable).parent)
SECONDS = 60.0

SSH = """#!/bin/bash
# An ssh to a host on which, while the file AWAY exists, the command that it names, or any, cannot be run.
host=$1
shift
if [ $host = b ] && [ -e {away} ] && [[ "$*" = *"$(cat {away})"* ]]; then
    echo "ssh: connect to host b port 22: No route to host" >&2
    exit 255
fi
set -o pipefail
cat | setsid env -i PATH="$PATH" {tag}="${tag}" bash -c "$*" | cat
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[TwoMonitors]:
    """A guest that runs on A, and a plan to move it to a host B behind ssh."""
    ssh, directory = tmp_path / "ssh", tmp_path / "a b"
    directory.mkdir()
    ssh.write_text(SSH.format(away=tmp_path / "away", tag=TAG))
    ssh.chmod(0o755)
    made = TwoMonitors(directory)
    made.change("destination", shell=(str(ssh), "b"), bin=TOOLS)
    with running(made):
        yield made


def away(stage: TwoMonitors, command: str = "") -> Path:
    """From now on B cannot be reached for such a command; the file that says so."""
    path = stage.directory.parent / "away"
    path.write_text(command)
    return path


def give_up(stage: TwoMonitors, *, by: signal.Signals) -> Process:
    """Begin a migration whose RAM hardly moves, cut B off, and end the orchestrator."""
    with monitor(stage.second) as a:
        a.execute("migrate-set-parameters", max_bandwidth=4096, downtime_limit=1)
    migration = stage.run()
    with monitor(stage.second) as a:
        wait_until(lambda: a.execute("query-migrate").get("status") == "active", "the RAM moves", SECONDS)
    away(stage)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if stage.plan.destination.shell[0] in words and " supervisor " in words[-1]:
            os.killpg(process.pid, signal.SIGKILL)
    migration.signal(by)
    return migration


def test_a_guest_that_is_back_on_a_is_said_to_be_there_when_b_cannot_be_cleared(stage: TwoMonitors) -> None:
    there = away(stage, "discard")
    with stage.run_doomed("MIGRATE", Role.SERVER) as migration:
        assert migration.wait(SECONDS) == 1
    last = migration.output().splitlines()[-1]
    assert "; the guest runs on A as before; but what was made on B is still there (" in last
    assert "No route to host" in last
    stage.wait_until_guest_works("a")
    assert stage.overlay.exists()
    # B is back: what was printed is pasted.
    there.unlink()
    remedy = re.search("remove it: (.*)$", last)
    assert remedy
    done = run("bash", "-c", remedy[1])
    assert done.returncode == 0, done.stderr
    with stage.run() as again:
        assert again.wait(SECONDS) == 0, again.output()
    stage.wait_until_guest_works("b")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_before_the_switch_over_a_b_that_is_away_does_not_keep_the_guest_from_a(
    stage: TwoMonitors, by: signal.Signals
) -> None:
    stage.change("limits", stop=1.0)
    with give_up(stage, by=by) as migration:
        assert migration.wait(SECONDS * 2) == (130 if by is signal.SIGTERM else -by)
        wait_until(lambda: "the guest runs on A as before" in migration.output(), "the verdict", SECONDS)
    last = migration.output().splitlines()[-1]
    assert "but what was made on B is still there" in last
    stage.wait_until_guest_works("a")
    assert stage.capabilities_of_a() == []
    # Cut off, what was there has ended by itself.
    wait_until(lambda: not stage.started(), "everything that was started has ended", 30.0)
