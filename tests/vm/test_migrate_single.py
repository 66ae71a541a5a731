"""Disk and RAM in one connection: that there is no other, who gets in, and what is done about its loss."""

from __future__ import annotations

import json
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.apart import ADDRESSES, LONG, ApartScene, apart
from tests.support.disks import MIB
from tests.support.processes import Process, check, wait_until
from tests.support.vms import ROOT, Role

PORT = 4444
"""At which B's end listens."""

PROBE = 64
"""Bytes of the connection by which it is tried beforehand that A reaches B."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ApartScene]:
    """A guest that runs on A, to be moved in one connection, at a speed that leaves time for what happens."""
    with apart(tmp_path) as made:
        made.change("channel", kind="single")
        made.change("limits", speed=6 * MIB)
        yield made


def made_for_it(stage: ApartScene) -> dict[str, int]:
    """The modes of what both ends have made, and of what is theirs alone."""
    suffixes = (".export", ".ram", ".channel.qmp", ".nbdserve.qmp", ".token")
    found = [path for path in stage.directory.rglob("*") if path.name.endswith(suffixes)]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}


def end_of(stage: ApartScene, role: Role) -> psutil.Process:
    """The process that is this end; ssh and supervisors have its words, too."""
    [found] = [each for each in role.find(stage.directory) if each.cmdline()[1].endswith("/nbdserve")]
    return found


def nothing_is_left(stage: ApartScene) -> None:
    """Of the channel: no process, no socket, no key, no token."""
    ends = (Role.CHANNEL, Role.SERVER)
    wait_until(lambda: not any(role.find(stage.directory) for role in ends), "both ends have ended", 60.0)
    wait_until(lambda: not made_for_it(stage), "their sockets are removed", 60.0)
    assert not list(stage.directory.rglob("*.tls"))


def is_on_b_whole(stage: ApartScene) -> None:
    """The guest and all of its disk are on B, and nothing is left."""
    stage.wait_until_guest_works("b")
    nothing_is_left(stage)
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


def flows(stage: ApartScene) -> Process:
    """Somebody who counts the connections that pass the cable of B."""
    words = ("flows", "to-b", str(stage.directory / "flows.json"))
    command = stage.net.on("c", sys.executable, "-m", "tests.support.onlookers", *words)
    return Process(command, stage.directory / "flows.log", cwd=ROOT)


def between_a_and_b(stage: ApartScene) -> list[int]:
    """The bytes of each connection that there has been between the two hosts, but for the one that tries."""
    told = json.loads((stage.directory / "flows.json").read_text())
    ends = (f"{ADDRESSES['a']}:", f"{ADDRESSES['b']}:")
    counts = [count for names, count in told.items() if all(end in names for end in ends)]
    return [count for count in counts if count != PROBE]


def ports(stage: ApartScene, host: str) -> set[int]:
    """The ports of TCP at which anybody listens there, but for sshd and the monitor of the scene."""
    told = check(*stage.net.on(host, "ss", "-Hltn")).splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in told} - {22, 4001}


@pytest.mark.representative
@pytest.mark.parametrize("policy", ["postcopy", pytest.param("hybrid", marks=pytest.mark.exhaustive)])
def test_there_is_one_connection_from_a_to_b_and_no_other(stage: ApartScene, policy: str) -> None:
    with flows(stage) as onlooker:
        onlooker.wait_for_line("listening", 30.0)
        with stage.run("--policy", policy) as migration:
            migration.wait_for_line("step 3", LONG)
            listening = ports(stage, "a"), ports(stage, "b")
            assert migration.wait(LONG) == 0, migration.output()
        assert onlooker.terminate() == 0
    assert listening == (set(), {PORT})
    assert "have not parted by themselves" not in migration.output()
    [count] = between_a_and_b(stage)
    assert count > len(stage.original), "all of the disk, and the RAM, have gone that way"
    is_on_b_whole(stage)


@pytest.mark.parametrize("victim", [Role.CHANNEL, Role.SERVER])
def test_an_end_that_dies_after_the_cut_over_is_started_again(stage: ApartScene, victim: Role) -> None:
    with stage.run() as migration:
        migration.wait_for_line(" of 64 MiB", LONG)
        assert set(made_for_it(stage).values()) == {0o600}
        end_of(stage, victim).kill()
        assert migration.wait(LONG) == 0, migration.output()
    assert "was ended by signal 9" in migration.output()
    is_on_b_whole(stage)


def test_both_ends_outlive_the_orchestrator_and_are_found_again(stage: ApartScene) -> None:
    with stage.doomed("PROGRESS", "ORCHESTRATOR") as migration:
        assert migration.wait(LONG) == -signal.SIGKILL
    stage.wait_until_guest_works("b")
    there, here = (end_of(stage, role) for role in (Role.CHANNEL, Role.SERVER))
    with stage.migrate("resume", "a", log="resume.log") as again:
        assert again.wait(LONG) == 0, again.output()
    assert not there.is_running()
    assert not here.is_running()
    is_on_b_whole(stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victims", ["CHANNEL", "SERVER", "CHANNEL+SERVER"])
def test_resume_starts_what_has_died_meanwhile(stage: ApartScene, victims: str) -> None:
    with stage.doomed("PROGRESS", f"ORCHESTRATOR+{victims}") as migration:
        assert migration.wait(LONG) == -signal.SIGKILL
    with stage.migrate("resume", "a", log="resume.log") as again:
        assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.parametrize("seconds", [3.0, pytest.param(25.0, marks=pytest.mark.exhaustive)])
def test_a_cable_that_is_pulled_costs_only_time(stage: ApartScene, seconds: float) -> None:
    with stage.run() as migration:
        migration.wait_for_line(" of 64 MiB", LONG)
        stage.net.cable("a", "down")
        # The longer is more than an end waits for the other one, which is silent.
        time.sleep(seconds)
        stage.net.cable("a", "up")
        code = migration.wait(LONG)
    if code:  # the way to A's monitors is not waited for as long
        with stage.migrate("resume", "a", log="resume.log") as again:
            assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("role", [Role.CHANNEL, Role.SERVER])
def test_an_end_that_stands_still_for_longer_than_the_other_waits_costs_only_time(
    stage: ApartScene, role: Role
) -> None:
    with stage.run() as migration:
        migration.wait_for_line(" of 64 MiB", LONG)
        end = end_of(stage, role)
        end.suspend()
        time.sleep(20.0)
        end.resume()
        code = migration.wait(LONG)
    if code:  # what does not answer is not waited for as long
        with stage.migrate("resume", "a", log="resume.log") as again:
            assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.exhaustive
def test_qemu_itself_copies_through_the_channel(tmp_path: Path) -> None:
    with apart(tmp_path, engine="qemu") as stage:
        stage.change("channel", kind="single")
        with stage.run() as migration:
            assert migration.wait(LONG) == 0, migration.output()
        is_on_b_whole(stage)


@pytest.mark.parametrize(
    ("policy", "moment", "victims"),
    [
        ("postcopy", "SWITCHOVER", "ORCHESTRATOR"),
        ("postcopy", "SWITCHOVER", "SERVER"),
        pytest.param("postcopy", "SWITCHOVER", "CHANNEL", marks=pytest.mark.exhaustive),
        pytest.param("postcopy", "LAUNCH", "ORCHESTRATOR", marks=pytest.mark.exhaustive),
        pytest.param("postcopy", "LAUNCH", "CHANNEL", marks=pytest.mark.exhaustive),
        pytest.param("postcopy", "MIGRATE", "CHANNEL", marks=pytest.mark.exhaustive),
        pytest.param("hybrid", "PRECOPY", "SERVER", marks=pytest.mark.exhaustive),
        pytest.param("hybrid", "PRECOPY", "CHANNEL", marks=pytest.mark.exhaustive),
    ],
)
def test_the_guest_is_on_a_as_before_when_it_fails_before_the_cut_over(
    stage: ApartScene, policy: str, moment: str, victims: str
) -> None:
    stage.change("destination", policy=policy)
    with stage.doomed(moment, victims) as migration:
        assert migration.wait(LONG) == (-signal.SIGKILL if victims == "ORCHESTRATOR" else 1), (
            migration.output()
        )
        wait_until(
            lambda: "the guest runs on A as before" in migration.output(), "it is told where it is", 60.0
        )
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "everything has ended", 60.0)
    wait_until(lambda: not stage.overlay.exists(), "the image on B is removed", 60.0)
    with stage.migrate("abort", "a", log="abort.log") as again:
        assert again.wait(LONG) == 0, again.output()
    nothing_is_left(stage)
    assert stage.capabilities_of_a() == []


def test_a_third_host_at_the_port_gets_nothing_and_disturbs_nobody(stage: ApartScene) -> None:
    with stage.run() as migration:
        migration.wait_for_line(" of 64 MiB", LONG)
        visited, door = stage.directory / "visited", f"{ADDRESSES['b']}:{PORT}"
        words = ("stranger", str(visited), door)
        command = stage.net.on("c", sys.executable, "-m", "tests.support.onlookers", *words)
        with Process(command, stage.directory / "stranger.log", cwd=ROOT) as stranger:
            stranger.wait_for_line("visiting", 30.0)
            assert migration.wait(LONG) == 0, migration.output()
    told = Path(f"{visited}.0").read_bytes()
    assert b"connected" in told
    assert len(told) < MIB // 16
    assert stage.original[:64] not in told
    is_on_b_whole(stage)


@pytest.mark.representative
def test_what_is_in_the_way_is_told_of_before_anything_starts(stage: ApartScene) -> None:
    (stage.directory / "a.raw.ram").touch()
    with stage.run() as migration:
        assert migration.wait(LONG) == 1
    [line] = migration.output().splitlines()
    assert line.endswith(
        "a.raw.ram exists on A, where the channel has a socket; remove it, if it is nobody's any more"
    )
    assert not stage.started()
