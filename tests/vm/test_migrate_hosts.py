"""A and B as two hosts: network namespaces with TCP between them, and commands that go through ssh."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.conftest import TAG
from tests.support.disks import MIB
from tests.support.processes import check, wait_until
from tests.support.sshd import sshd
from tests.support.vms import Role, Scene, running

TOOLS = str(Path(sys.executable).parent)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two hosts, 10.99.0.1 and 10.99.0.2, with a cable between them and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = (f"nbd-a-{os.getpid()}", f"nbd-b-{os.getpid()}")
    with ExitStack() as stack:
        for name in names:
            check("ip", "netns", "add", name)
            stack.callback(check, "ip", "netns", "delete", name)
        ends = ("name", "eth0", "netns", names[0]), ("name", "eth0", "netns", names[1])
        check("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(names, start=1):
            check("ip", "-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            check("ip", "-n", name, "link", "set", "eth0", "up")
        yield names


@pytest.fixture
def apart(tmp_path: Path, namespaces: tuple[str, str]) -> Iterator[Scene]:
    """A guest that runs on one of them, and a plan to move it to the other."""
    a, b = (("ip", "netns", "exec", name) for name in namespaces)
    stage = Scene(tmp_path)
    stage.change("source", shell=a)
    stage.change("export", uri="nbd://10.99.0.1:10809/vm")
    stage.change("destination", shell=b, migration="tcp:10.99.0.2:4444")
    with running(stage, *a):
        yield stage


@pytest.mark.representative
def test_a_guest_moves_over_tcp_from_one_host_to_another(apart: Scene) -> None:
    with apart.run() as run:
        assert run.wait(60.0) == 0, run.output()
    apart.wait_until_guest_works("b")
    apart.quit_b()
    assert apart.wrong_sectors() == []


def test_a_guest_moves_over_link_local_addresses(tmp_path: Path, namespaces: tuple[str, str]) -> None:
    for number, name in enumerate(namespaces, start=1):
        check("ip", "-n", name, "address", "add", f"fe80::{number}/64", "dev", "eth0", "nodad")
    a, b = (("ip", "netns", "exec", name) for name in namespaces)
    stage = Scene(tmp_path)
    stage.change("source", shell=a)
    stage.change("export", uri="nbd://[fe80::1%25eth0]:10809/vm")
    stage.change("destination", shell=b, migration="tcp:[fe80::2%eth0]:4444")
    with running(stage, *a):
        with stage.run() as run:
            assert run.wait(60.0) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


def test_a_cable_that_is_pulled_for_a_while_costs_only_time(apart: Scene) -> None:
    apart.change("limits", speed=16 * MIB)
    cable = ("ip", "-n", apart.plan.source.shell[-1], "link", "set", "eth0")
    with apart.run() as run:
        run.wait_for_line(" of 64 MiB")
        check(*cable, "down")
        time.sleep(2.0)
        waiting = apart.dots("b")
        time.sleep(0.5)
        assert apart.dots("b") == waiting, "the guest waits for its disk"
        check(*cable, "up")
        assert run.wait(60.0) == 0, run.output()
    apart.wait_until_guest_works("b")
    apart.quit_b()
    assert apart.wrong_sectors(interrupted=True) == []


@pytest.fixture
def over_ssh(tmp_path: Path) -> Iterator[Scene]:
    """Both hosts behind an ssh, which gives its words to a shell, and a path that shells would split."""
    ssh = tmp_path / "ssh"
    # The words reach another shell as one string, in a session and an environment of its own; what comes and
    # goes is relayed, so that both ends of a session that is killed see the end of file.
    remote = f'setsid env -i PATH="$PATH" {TAG}="${TAG}" bash -c "$*"'
    ssh.write_text(f"#!/bin/bash\nshift\nset -o pipefail\ncat | {remote} | cat\n")
    ssh.chmod(0o755)
    directory = tmp_path / "a b;c"
    directory.mkdir()
    stage = Scene(directory)
    stage.change("source", shell=(str(ssh), "a"), bin=TOOLS)
    stage.change("destination", shell=(str(ssh), "b"), bin=TOOLS)
    with running(stage):
        yield stage


def test_commands_reach_their_hosts_through_ssh_word_by_word(over_ssh: Scene) -> None:
    with over_ssh.run() as run:
        assert run.wait(60.0) == 0, run.output()
    over_ssh.wait_until_guest_works("b")
    wait_until(lambda: not supervisors(over_ssh), "the supervisors end", 10.0)
    over_ssh.quit_b()
    assert over_ssh.wrong_sectors() == []


def test_sessions_that_break_after_the_cut_over_end_nothing(over_ssh: Scene) -> None:
    over_ssh.change("limits", speed=32 * MIB)
    with over_ssh.run() as run:
        run.wait_for_line(" of 64 MiB")
        for session in sessions(over_ssh):
            os.killpg(session.pid, signal.SIGKILL)
        assert run.wait(60.0) == 0, run.output()
    over_ssh.wait_until_guest_works("b")
    over_ssh.wait_until_only({Role.B})
    over_ssh.quit_b()
    assert over_ssh.wrong_sectors() == []


def test_nothing_is_left_behind_ssh_when_the_orchestrator_is_killed(over_ssh: Scene) -> None:
    with over_ssh.run_doomed("MIGRATE", Role.ORCHESTRATOR) as run:
        assert run.wait(30.0) == -signal.SIGKILL
        run_ended = "the guest runs on A as before"
        wait_until(lambda: run_ended in run.output(), run_ended, 10.0)
    wait_until(lambda: not over_ssh.started() and not supervisors(over_ssh), "everything has ended", 10.0)
    assert not over_ssh.overlay.exists()
    over_ssh.wait_until_guest_works("a")


@pytest.fixture
def over_sshd(tmp_path: Path) -> Iterator[Scene]:
    """Both hosts behind a real ssh, to a server that greets on both outputs."""
    banner, keys = tmp_path / "banner", tmp_path / "keys"
    banner.write_text("Authorized access only\n")
    keys.mkdir()
    greeting = "ForceCommand echo 'Welcome!'; eval \"$SSH_ORIGINAL_COMMAND\""
    with sshd(keys, f"Banner {banner}", greeting) as server:
        stage = Scene(tmp_path)
        stage.change("source", shell=server.prefix, bin=TOOLS)
        stage.change("destination", shell=server.prefix, bin=TOOLS)
        with running(stage):
            yield stage


def test_hosts_that_greet_whoever_logs_in_are_like_others(over_sshd: Scene) -> None:
    with over_sshd.run() as run:
        assert run.wait(90.0) == 0, run.output()
    over_sshd.wait_until_guest_works("b")
    over_sshd.quit_b()
    assert over_sshd.wrong_sectors() == []


def supervisors(stage: Scene) -> list[psutil.Process]:
    """Supervisors on the other side of an ssh."""
    return [process for process in of_scene(stage) if "supervisor" in process.info["cmdline"]]


def sessions(stage: Scene) -> list[psutil.Process]:
    """Sessions of ssh in which a supervisor runs."""
    ssh = stage.plan.source.shell[0]
    found = [process for process in of_scene(stage) if process.info["cmdline"][1] == ssh]
    return [process for process in found if " supervisor " in process.info["cmdline"][-1]]


def of_scene(stage: Scene) -> list[psutil.Process]:
    """The processes whose command line names the scene's directory, behind quotes or not."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if str(stage.directory) in " ".join(process.info["cmdline"] or [])]
