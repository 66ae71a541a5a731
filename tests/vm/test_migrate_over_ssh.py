"""A and B behind ssh addresses: one shared connection each, nothing forwarded, and any of it may be lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import ADDRESSES, LONG, ApartScene, apart
from tests.support.disks import MIB
from tests.support.processes import Process, wait_until
from tests.support.vms import Role


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ApartScene]:
    """A guest that runs on A."""
    with apart(tmp_path) as made:
        yield made


def logins(stage: ApartScene, host: str) -> int:
    """How often the orchestrator was let in."""
    return (stage.directory / f"sshd_{host}.log").read_text().count("Accepted publickey")


def cut(stage: ApartScene) -> None:
    """Kill what keeps the connections."""
    for process in stage.connections():
        process.kill()
    wait_until(lambda: not stage.connections(), "they are dead")


def last_line(run: Process) -> str:
    """What the operator reads in the end."""
    return run.output().splitlines()[-1]


def is_on_b_whole(stage: ApartScene) -> None:
    """The guest and all of its disk are on B."""
    stage.wait_until_guest_works("b")
    stage.nothing_is_left_of_ssh()
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


def is_on_a_as_before(stage: ApartScene) -> None:
    """The guest is on A, and nothing of the migration is anywhere."""
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "everything has ended", 60.0)
    wait_until(lambda: not stage.overlay.exists(), "the image on B is removed", 60.0)
    stage.nothing_is_left_of_ssh()
    assert stage.capabilities_of_a() == []


def test_a_guest_moves_over_one_connection_to_each_host(stage: ApartScene) -> None:
    with stage.run() as run:
        assert run.wait(LONG) == 0, run.output()
    assert (logins(stage, "a"), logins(stage, "b")) == (1, 1)
    is_on_b_whole(stage)


MOST = 30
"""Commands over ssh, to both hosts together, before anything is started; each costs a round trip."""


def test_few_commands_are_run_on_both_hosts_before_anything_is_started(tmp_path: Path) -> None:
    with apart(tmp_path, "LogLevel VERBOSE") as stage:
        # What is looked at last.
        stage.change("destination", seed=str(tmp_path / "nowhere"))
        with stage.run() as run:
            assert run.wait(LONG) == 1, run.output()
        assert "destination.seed: " in last_line(run)
        logs = [(tmp_path / f"sshd_{host}.log").read_text() for host in ("a", "b")]
        counts = [log.count("Starting session") for log in logs]
        print("commands:", counts)
        assert all(counts)
        assert sum(counts) <= MOST, [line for log in logs for line in log.splitlines() if "Starting" in line]


def test_hosts_are_named_on_the_command_line(stage: ApartScene) -> None:
    stage.change("destination", host="", qmp="127.0.0.1:4002")
    stage.change("source", host="")
    a, b = (f"ssh://{ADDRESSES[host]}" for host in ("a", "b"))
    with stage.run("--from", a, "--to", b, "--engine", "overlay") as run:
        assert run.wait(LONG) == 0, run.output()
    is_on_b_whole(stage)


def test_hosts_that_greet_and_allow_few_sessions_are_like_others(tmp_path: Path) -> None:
    greeting = "ForceCommand echo 'Welcome!'; printf 'no end'; eval \"$SSH_ORIGINAL_COMMAND\""
    with apart(tmp_path, greeting, "MaxSessions 2") as stage:
        with stage.run() as run:
            assert run.wait(LONG) == 0, run.output()
        is_on_b_whole(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("step", ["step 1", "step 3"])
def test_connections_that_are_killed_before_the_cut_over_leave_the_guest_on_a(
    stage: ApartScene, step: str
) -> None:
    with stage.run() as run:
        run.wait_for_line(step, 60.0)
        cut(stage)
        assert run.wait(LONG) == 1, run.output()
    assert "the guest runs on A as before" in last_line(run), run.output()
    is_on_a_as_before(stage)


def test_connections_that_are_killed_after_the_cut_over_end_nothing(stage: ApartScene) -> None:
    stage.change("limits", speed=4 * MIB)
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB", 120.0)
        cut(stage)
        code = run.wait(LONG)
    stage.wait_until_guest_works("b")
    if code:  # its last step may have been under way
        assert "the guest is on B and stays there" in last_line(run), run.output()
        with stage.migrate("resume", "a", log="resume.log") as again:
            assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", ["LAUNCH", "SWITCHOVER"])
def test_the_guard_reaches_both_hosts_when_the_orchestrator_is_killed(stage: ApartScene, moment: str) -> None:
    with stage.doomed(moment, "ORCHESTRATOR") as run:
        assert run.wait(LONG) == -signal.SIGKILL
        run_ended = "the guest runs on A as before"
        wait_until(lambda: run_ended in run.output(), run_ended, 60.0)
    is_on_a_as_before(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("command", ["resume", "finish"])
def test_an_orchestrator_that_is_killed_after_the_cut_over_has_its_work_done_by(
    stage: ApartScene, command: str
) -> None:
    stage.change("limits", speed=4 * MIB)
    with stage.doomed("PROGRESS", "ORCHESTRATOR") as run:
        assert run.wait(LONG) == -signal.SIGKILL
    stage.wait_until_guest_works("b")
    which = "a" if command == "resume" else str(stage.directory / "plan.toml")
    with stage.migrate(command, which, log="again.log") as again:
        assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


def test_a_host_that_is_cut_off_before_the_cut_over_is_told_of_and_abort_clears_it(stage: ApartScene) -> None:
    stage.change("limits", connect=20.0, command=20.0, stop=20.0)
    with stage.run() as run:
        run.wait_for_line("step 3", 120.0)
        stage.net.cable("b", "down")
        assert run.wait(LONG) == 1, run.output()
    assert "the guest runs on A as before; but " in last_line(run), run.output()
    stage.wait_until_guest_works("a")
    stage.net.cable("b", "up")
    with stage.migrate("abort", "a", log="abort.log") as again:
        assert again.wait(LONG) == 0, again.output()
    is_on_a_as_before(stage)


def test_a_cable_that_is_pulled_for_a_moment_after_the_cut_over_costs_only_time(stage: ApartScene) -> None:
    stage.change("limits", speed=8 * MIB)
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB", 120.0)
        for host in ("a", "b"):
            stage.net.cable(host, "down")
            time.sleep(3.0)
            stage.net.cable(host, "up")
        assert run.wait(LONG) == 0, run.output()
    assert (logins(stage, "a"), logins(stage, "b")) == (1, 1)
    is_on_b_whole(stage)


@pytest.mark.representative
def test_what_is_wrong_with_a_way_is_one_line_before_anything_is_started(stage: ApartScene) -> None:
    def complaint(**changes: object) -> str:
        before = stage.plan
        stage.change("destination", **changes)
        with stage.run() as run:
            code = run.wait(LONG)
        stage.plan = before
        [line] = run.output().splitlines()
        run.log.unlink()
        assert code == 1
        return line

    b = ADDRESSES["b"]
    stage.change("limits", command=20.0)
    assert "Connection refused; see that sshd runs there" in complaint(host=f"ssh://{b}:2222")
    assert "Could not resolve hostname" in complaint(host="ssh://no-such-host.invalid")
    assert "correct the host's name" in complaint(host="ssh://no-such-host.invalid")
    assert "see that the host is up" in complaint(host="ssh://10.99.0.77")
    assert "there is no /no/nbd-overlay on B" in complaint(bin="/no")
    known = stage.directory / "known_hosts"
    text = known.read_text()
    known.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith(b)))
    assert f"connect once by hand and confirm its key: ssh ssh://root@{b}:22 true" in complaint()
    known.write_text(text)
    (stage.directory / "authorized").write_text("")
    assert "Permission denied" in complaint()
    assert not stage.started()
    stage.nothing_is_left_of_ssh()
    assert not any(os.scandir(stage.runtime))
