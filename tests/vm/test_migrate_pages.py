"""The procedures of docs/migrate.md and docs/recipes.md, typed as they stand but for the paths."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.pasting import after, blocks, in_places, paste, pasted_well
from tests.support.processes import wait_until
from tests.support.recipes import DIRECTORY
from tests.support.servers import free_tcp_address
from tests.support.vms import QEMU, ROOT, Role, Scene, scene
from tests.vm.test_migrate_finish import ENGINES, MIB, SECONDS, assert_finished

PAGE = ROOT / "docs" / "migrate.md"
FINISH, BY_HAND, BY_HAND_WITHOUT_GUEST, BY_HAND_WITH_OVERLAY = blocks(PAGE, "When a run has ended after")


def typed(stage: Scene, commands: Sequence[str], *, on_b: str = "") -> list[str]:
    """The commands with the paths of this scene; ``on_b`` is what B has in the place of A's disk."""
    log = str(stage.directory / "log")
    places = {
        "/var/lib/images/vm.moved": str(stage.moved),
        "/var/lib/images/vm.qed": str(stage.overlay),
        "/var/lib/images/vm.raw": on_b or str(stage.image),
        "/run/vm/a.qmp": str(stage.monitor_a),
        "/run/vm/b.qmp": str(stage.monitor_b),
        "/var/log/nbd-migrate/vm.raw": f"{log}/{stage.image.name}",
        "recipes/": f"{DIRECTORY}/",
        "plan.toml": str(stage.directory / "plan.toml"),
    }
    return in_places(commands, places)


def orphaned(stage: Scene, moment: str, *victims: Role) -> None:
    """Run the plan until its orchestrator, and others, are killed."""
    stage.change("log", directory=str(stage.directory / "log"))
    stage.change("limits", speed=16 * MIB)
    with stage.run_doomed(moment, Role.ORCHESTRATOR, *victims) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", 60.0)
    stage.change("limits", speed=0)
    stage.plan_file()


def finished(stage: Scene, guest: Role | None = Role.B, *, by_hand: bool = True) -> None:
    """What must be so in the end; the logs have a directory of their own here.

    Where it was finished by hand, nobody has told the supervisor of B's QEMU, which stays with that.
    """
    log = stage.directory / "log"
    for path in log.glob("*.log"):
        path.unlink()
    own = {f"{stage.overlay.name}.qemu.supervisor"} if by_hand and guest is Role.B else set()
    wait_until(lambda: {path.name for path in log.iterdir()} <= own, "nothing is left")
    aside = log.rename(stage.directory.with_name(f"{stage.directory.name}.log"))
    assert_finished(stage, guest)
    shutil.rmtree(aside)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_one_command_finishes_a_run_that_was_killed(tmp_path: Path, engine: str) -> None:
    with scene(tmp_path, engine) as stage:
        orphaned(stage, "PROGRESS")
        for command in typed(stage, FINISH):
            pasted_well(command)
        finished(stage, by_hand=False)


def test_the_recipes_finish_a_run_that_was_killed(tmp_path: Path) -> None:
    with scene(tmp_path, "qemu") as stage:
        orphaned(stage, "PROGRESS")
        for command in typed(stage, BY_HAND):
            pasted_well(command)
        finished(stage)


def test_the_recipes_complete_the_disk_of_a_guest_that_has_ended(tmp_path: Path) -> None:
    with scene(tmp_path, "qemu") as stage:
        orphaned(stage, "PROGRESS", Role.B)
        for command in typed(stage, BY_HAND_WITHOUT_GUEST):
            pasted_well(command)
        finished(stage, None)


def test_by_hand_nbd_overlay_is_told_to_do_what_the_run_would_have_told_it(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        orphaned(stage, "STREAM")
        for command in typed(stage, BY_HAND_WITH_OVERLAY, on_b=str(stage.overlay)):
            pasted_well(command)
        pasted_well(typed(stage, BY_HAND)[1])
        finished(stage)


def test_what_is_typed_too_early_takes_nothing_from_the_guest(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        orphaned(stage, "STREAM")
        commands = typed(stage, BY_HAND_WITH_OVERLAY, on_b=str(stage.overlay))
        assert "overlay-activate" not in commands[1]
        for command in (*commands[2:], typed(stage, BY_HAND)[1]):
            done = paste(command)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), (command, done)
        stage.wait_until_guest_works("b")
        assert Role.OVERLAY.find(stage.directory)
        assert Role.SERVER.find(stage.directory)
        assert stage.away.exists()
        for command in typed(stage, FINISH):
            pasted_well(command)
        finished(stage)


def test_a_guest_that_stands_still_before_the_switch_over_is_let_run(tmp_path: Path) -> None:
    """When everybody is dead who could have told A's QEMU."""
    with scene(tmp_path) as stage:
        orphaned(stage, "SWITCHOVER", Role.CHIEF, Role.DEPUTY)
        ((cancel,),) = blocks(PAGE, "Who has the guest, at any time")
        for command in typed(stage, FINISH):
            done = paste(command)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
            assert after("and goes on with", done.stderr) == typed(stage, [cancel])[0]
        with stage.run() as run:
            assert run.wait(SECONDS) == 1
        assert "nbd-migrate resume a takes it up, nbd-migrate abort a takes it back" in run.output()
        pasted_well(*typed(stage, [cancel]))
        stage.wait_until_guest_works("a")
        done = paste(typed(stage, FINISH)[0])
        assert "the guest is on A" in done.stderr


@pytest.mark.representative
def test_the_six_recipes_are_typed_as_their_page_has_them(tmp_path: Path) -> None:
    with scene(tmp_path, "qemu") as stage:
        exports, steps = blocks(ROOT / "docs" / "recipes.md", "The six steps by hand")
        changes = {
            "192.0.2.1": "127.0.0.1",
            "tcp:192.0.2.2:4444": f"unix:{stage.directory / 'migration'}",
            # Here both are on one host.
            "ssh -fN -L /run/vm/b.qmp:/run/vm/b.qmp b.example": "true",
            "qemu-system-x86_64 -m 2G ...": " ".join([*QEMU, "-serial", f"file:{stage.directory}/b.serial"]),
            "/var/lib/images/vm.raw.moved": str(stage.moved),
        }
        lines = [
            f"export NBD_PORT={free_tcp_address().port} NBD_PID_FILE={stage.directory}/server.pid",
            f"export FENCE_FILE={stage.directory}/fence.pid",
        ]
        for command in (*exports, *steps):
            for old, new in changes.items():
                command = command.replace(old, new)
            lines.append(command)
        pasted_well("\n".join(["set -e", *typed(stage, lines)]))
        assert stage.started() == {Role.B}
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []
