"""Shell recipes that are interrupted, or fail, before they have done what they are for."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil

from tests.support.processes import Process, wait_until
from tests.support.recipes import COMMANDS, RECIPES
from tests.support.vms import Role, monitor, scene
from tests.vm.test_recipes_by_hand import operator_of
from tests.vm.test_switch_over_states import standing

SECONDS = 60.0

SLOW = """#!/bin/bash
# nbd-migrate, whose migrate takes its time.
[ "$3" != migrate ] || exec sleep 1000
exec {real} "$@"
"""


def _sleeps(recipe: Process) -> bool:
    """Whether its command sleeps by now; a shell on its way there lets an interruption pass."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return ["sleep", "1000"] in [
            child.cmdline() for child in psutil.Process(recipe.pid).children(recursive=True)
        ]
    return False


def test_a_guest_that_came_here_by_a_migration_is_not_taken_for_one_that_has_left(tmp_path: Path) -> None:
    """Its QEMU says ``completed`` of the migration by which it came."""
    tools = tmp_path / "tools"
    tools.mkdir()
    slow = tools / "nbd-migrate"
    slow.write_text(SLOW.format(real=COMMANDS / "nbd-migrate"))
    slow.chmod(0o755)
    directory = tmp_path / "scene"
    directory.mkdir()
    with scene(directory, "qemu") as stage, standing(stage) as switching:
        switching.go_on("completed")
        stage.wait_until_guest_works("b")
        env = {
            "DISK": str(directory / "b.img"),
            "SOURCE_QMP": str(stage.monitor_b),
            "MIGRATION": f"unix:{directory / 'next'}",
            "FENCE_FILE": str(directory / "fence.pid"),
            "PATH": f"{tools}:{COMMANDS}:{os.environ['PATH']}",
        }
        with Process(["setsid", RECIPES[3]], tmp_path / "migrate.log", env=env) as migrating:
            migrating.wait_for(lambda: _sleeps(migrating), "the migration is to begin", SECONDS)
            os.killpg(migrating.pid, signal.SIGINT)
            assert migrating.wait(SECONDS) == 1
            assert "the guest runs on here, on A, as the migration failed: interrupted" in migrating.output()
        assert not Role.FENCE.find(directory)
        stage.wait_until_guest_works("b")


def test_a_qemu_that_cannot_wait_for_the_guest_is_in_nobodys_way(tmp_path: Path) -> None:
    with scene(tmp_path, "qemu") as stage:
        operator = operator_of(stage)
        operator.must(1)
        operator.must(2)
        qemu = stage.plan.destination.qemu
        line = operator.fails(3, *qemu, MIGRATION=f"unix:{tmp_path}/there/is/none")
        assert "B's QEMU was ended, as it cannot wait for the guest, which runs on, on A: " in line
        assert "No such file or directory" in line
        wait_until(lambda: not Role.B.find(tmp_path), "it ends")
        operator.must(3, *qemu)
        with monitor(stage.monitor_b) as b:
            assert b.state == "inmigrate"
        stage.wait_until_guest_works("a")
