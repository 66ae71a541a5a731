"""Disk and RAM through the operator's ssh, whose sshd forbids all forwarding: what is lost is made again.

What the network sees of it is in test_migrate_channel.py.
"""

from __future__ import annotations

import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import LONG, ApartScene, apart
from tests.support.disks import MIB
from tests.support.processes import Process, wait_until
from tests.support.vms import Role


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ApartScene]:
    """A guest that runs on A, to be moved through ssh at a speed that leaves time for what may happen."""
    with apart(tmp_path) as made:
        made.change("channel", kind="ssh")
        made.change("limits", speed=6 * MIB)
        yield made


def sockets(stage: ApartScene) -> dict[str, int]:
    """The modes of the sockets of the tunnel, and of what stands at its other ends."""
    found = [
        path for path in stage.directory.rglob("*") if ".raw.export" in path.name or ".raw.ram" in path.name
    ]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}


def nothing_is_left(stage: ApartScene) -> None:
    """Of the tunnel: no process, no connection, no socket."""
    wait_until(lambda: not Role.TUNNEL.find(stage.directory), "the tunnel has ended", 60.0)
    wait_until(lambda: not sockets(stage), "its sockets are removed", 60.0)
    stage.nothing_is_left_of_ssh()


def is_on_b_whole(stage: ApartScene) -> None:
    """The guest and all of its disk are on B, and nothing is left."""
    stage.wait_until_guest_works("b")
    nothing_is_left(stage)
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


def last_line(run: Process) -> str:
    """What the operator reads in the end."""
    return run.output().splitlines()[-1]


def test_whatever_leads_through_ssh_may_die_after_the_cut_over(stage: ApartScene) -> None:
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB", LONG)
        assert set(sockets(stage).values()) == {0o600}
        [tunnel] = Role.TUNNEL.find(stage.directory)
        tunnel.kill()
        run.wait_for_line("the export is back", LONG)
        for connection in stage.connections():
            connection.kill()
        code = run.wait(LONG)
        assert "the tunnel was ended by signal 9" in run.output()
    if code:  # its last step may have been under way when the way to the hosts was lost
        with stage.migrate("resume", "a", log="resume.log") as again:
            assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


def test_a_tunnel_outlives_its_orchestrator_and_is_found_again(stage: ApartScene) -> None:
    with stage.doomed("PROGRESS", "ORCHESTRATOR") as run:
        assert run.wait(LONG) == -signal.SIGKILL
    stage.wait_until_guest_works("b")
    [tunnel] = Role.TUNNEL.find(stage.directory)
    with stage.migrate("resume", "a", log="resume.log") as again:
        assert again.wait(LONG) == 0, again.output()
    assert "the tunnel" not in again.output(), "it was there, and nothing had to be done"
    assert not tunnel.is_running()
    is_on_b_whole(stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["TUNNEL", "SERVER"])
def test_resume_starts_what_has_died_meanwhile(stage: ApartScene, victim: str) -> None:
    with stage.doomed("PROGRESS", f"ORCHESTRATOR+{victim}") as run:
        assert run.wait(LONG) == -signal.SIGKILL
    with stage.migrate("resume", "a", log="resume.log") as again:
        assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [3.0, 25.0])
def test_a_cable_that_is_pulled_costs_only_time(stage: ApartScene, seconds: float) -> None:
    with stage.run() as run:
        run.wait_for_line(" of 64 MiB", LONG)
        stage.net.cable("b", "down")
        # The longer is more than ssh waits for a host that is silent.
        time.sleep(seconds)
        stage.net.cable("b", "up")
        code = run.wait(LONG)
    if code:  # the way to B's monitors is not waited for as long
        with stage.migrate("resume", "a", log="resume.log") as again:
            assert again.wait(LONG) == 0, again.output()
    is_on_b_whole(stage)


@pytest.mark.parametrize(
    ("moment", "victims"),
    [
        ("SWITCHOVER", "ORCHESTRATOR"),
        pytest.param("LAUNCH", "ORCHESTRATOR", marks=pytest.mark.exhaustive),
        pytest.param("LAUNCH", "TUNNEL", marks=pytest.mark.exhaustive),
        pytest.param("MIGRATE", "TUNNEL", marks=pytest.mark.exhaustive),
    ],
)
def test_the_guest_is_on_a_as_before_when_it_fails_before_the_cut_over(
    stage: ApartScene, moment: str, victims: str
) -> None:
    with stage.doomed(moment, victims) as run:
        assert run.wait(LONG) == (-signal.SIGKILL if victims == "ORCHESTRATOR" else 1), run.output()
        wait_until(lambda: "the guest runs on A as before" in run.output(), "it is told where it is", 60.0)
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "everything has ended", 60.0)
    wait_until(lambda: not stage.overlay.exists(), "the image on B is removed", 60.0)
    # Who was killed leaves a directory, which the next one removes.
    with stage.migrate("abort", "a", log="abort.log") as again:
        assert again.wait(LONG) == 0, again.output()
    nothing_is_left(stage)
    assert stage.capabilities_of_a() == []


@pytest.mark.representative
def test_a_socket_in_the_way_is_told_of_before_anything_starts(stage: ApartScene) -> None:
    (stage.directory / "a.raw.ram").touch()
    with stage.run() as run:
        assert run.wait(LONG) == 1
    [line] = run.output().splitlines()
    assert line.endswith(
        "a.raw.ram exists on A, where the tunnel has a socket; remove it, if it is nobody's any more"
    )
    assert not stage.started()
