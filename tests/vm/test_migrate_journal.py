"""A migration is taken up, or taken back, wherever its command was killed: at every entry of its journal.

The kernel kills the command in the very call that makes an entry durable: what the entry announces has not
been done. In every second test its guard and that guard's deputy die with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.errors import MigrationError
from recipes.migrate import journal
from recipes.migrate.decide import MOVING, ON_B, PREPARING, SENDING
from recipes.migrate.state import Phase
from tests.support.killed import NAME, SECONDS, command, kill_at, traced
from tests.support.processes import Process, listens, run, wait_until
from tests.support.vms import NBD_MIGRATE, QEMU, Role, Scene, lives, monitor, running, scene

ENTRIES = 18
"""How often an undisturbed run makes something durable: an entry each, and once each of two directories."""

ARRIVAL = 13
"""Which of its calls of pwrite writes that the guest has arrived."""

NO_FENCE = "no fence:"
"""What is said where A's disk could not be fenced."""

KILLED_AT = list(enumerate(range(1, ENTRIES + 1)))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    made = Scene(tmp_path, disk_size=8 << 20)
    with running(made):
        yield made


def is_on_a_as_before(stage: Scene) -> None:
    """Nothing shows that there was a migration."""
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), f"nothing is left: {stage.started()}", SECONDS)
    assert stage.capabilities_of_a() == []
    # A QEMU that fails leaves its monitor's socket, which is in nobody's way.
    left = {path.name for path in stage.directory.iterdir() if path.name.startswith("b.")}
    assert left <= {"b.serial", "b.qmp", "b.raw.qemu.log", "b.raw.overlay.log"}, left


def is_on_b(stage: Scene) -> None:
    """The guest runs on B, on the whole of its disk, and nothing on A is left."""
    stage.wait_until_guest_works("b")
    wait_until(lambda: stage.started() == {Role.B}, f"B's QEMU alone is left: {stage.started()}", SECONDS)
    assert not Role.A.find(stage.directory)
    # Nor has any supervisor stayed.
    wait_until(lambda: not list(stage.directory.glob("*.supervisor")), "no supervisor stays", SECONDS)
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


def test_a_run_makes_as_many_entries_as_are_tried(stage: Scene, tmp_path: Path) -> None:
    trace = tmp_path / "fsync"
    with traced(stage, "-o", str(trace)) as made:
        assert made.wait(SECONDS) == 0
    assert trace.read_text().count("fsync(") == ENTRIES
    history = [state.phase for state in journal.history(NAME)]
    assert [phase for phase, _ in itertools.groupby(history)] == [
        *(Phase.PREPARED, Phase.EXPORT, Phase.OVERLAY, Phase.LAUNCH, Phase.MIGRATE, Phase.SWITCH_OVER),
        *(Phase.ARRIVED, Phase.STREAM, Phase.COMPLETE, Phase.SHUT_DOWN, Phase.DONE),
    ]
    is_on_b(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("number", "entry"), KILLED_AT)
@pytest.mark.representative
def test_a_migration_that_was_killed_is_taken_up_again(stage: Scene, number: int, entry: int) -> None:
    kill_at(stage, entry, guards=number % 2 == 0)
    code, said = command("resume", NAME)
    assert code == 0, said
    assert NO_FENCE not in said, said
    assert journal.last(NAME).phase is Phase.DONE
    is_on_b(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("number", "entry"), KILLED_AT)
@pytest.mark.representative
def test_a_migration_that_was_killed_is_taken_back_until_the_guest_has_left(
    stage: Scene, number: int, entry: int
) -> None:
    phase = kill_at(stage, entry, guards=number % 2 == 1)
    code, said = command("abort", NAME)
    if phase in PREPARING | SENDING | MOVING:
        assert code == 0, said
        is_on_a_as_before(stage)
        assert journal.last(NAME).phase is Phase.TAKEN_BACK
        return
    assert code == 1
    assert said.startswith("nbd-migrate: it is too late, and nothing was touched: the guest "), said
    code, said = command("resume", NAME)
    assert code == 0, said
    assert NO_FENCE not in said, said
    is_on_b(stage)


def test_a_guest_that_has_changed_sides_unseen_is_found_on_b(stage: Scene) -> None:
    """Its command, and who watched over it, were killed in the call that would have written that down."""
    assert kill_at(stage, ARRIVAL, guards=True, call="pwrite64") is Phase.SWITCH_OVER
    stage.wait_until_guest_works("b")
    code, said = command("abort", NAME)
    assert (code, "it is too late, and nothing was touched: the guest is on B" in said) == (1, True), said
    stage.wait_until_guest_works("b")
    code, said = command("resume", NAME)
    assert code == 0, said
    # Too late for anything: the guest is where it is to be.
    code, said = command("abort", NAME)
    assert code == 1, said
    assert "it is too late, and nothing was touched: the guest and its disk are on B" in said
    stage.wait_until_guest_works("b")
    is_on_b(stage)
    assert command("cleanup") == (0, "")
    assert command("list") == (0, "")


@pytest.mark.representative
def test_a_guest_that_stands_still_before_the_switch_over_is_let_run(stage: Scene) -> None:
    assert kill_at(stage, ARRIVAL - 1, guards=True, call="pwrite64") is Phase.MIGRATE
    with monitor(stage.monitor_a) as a:
        assert a.state != "running"
    code, said = command("abort", NAME)
    assert code == 0, said
    is_on_a_as_before(stage)


def test_a_guest_that_was_let_run_on_both_sides_is_the_operators_to_judge(stage: Scene) -> None:
    """Whoever acts here names what to look with, and goes on when one of the two was ended."""
    kill_at(stage, ARRIVAL, guards=True, call="pwrite64")
    stage.wait_until_guest_works("b")
    with monitor(stage.monitor_a) as a:
        wait_until(lambda: a.state == "postmigrate", "A's QEMU has sent everything", SECONDS)
        a.execute("cont")
    for name in ("abort", "resume"):
        code, said = command(name, NAME)
        assert (code, "a guest runs on A, where it was told to go on" in said) == (1, True), said
        look = re.search(r"look who has the guest: (.*); then resume or abort again", said)
        assert look, said
        queries = look[1].split("; ")
        assert len(queries) == 3
        for query in queries:
            words = shlex.split(query)
            assert run(str(NBD_MIGRATE), *words[1:], seconds=SECONDS).returncode == 0, query
    with monitor(stage.monitor_a) as a:
        a.execute("quit")
    code, said = command("resume", NAME)
    assert code == 0, said
    is_on_b(stage)


def test_a_guest_that_runs_at_a_s_monitor_later_is_not_ended(stage: Scene) -> None:
    """The old one has left long ago, and been ended: this is another, or was started by mistake."""
    kill_at(stage, ENTRIES - 3, guards=True)
    assert journal.last(NAME).phase in ON_B
    wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU has ended", SECONDS)
    stage.monitor_a.unlink(missing_ok=True)
    argv = [*QEMU, "-qmp", f"unix:{stage.monitor_a},server=on,wait=off"]
    with Process(argv, stage.directory / "another.log") as another:
        wait_until(lambda: listens(stage.monitor_a), "it is there", SECONDS)
        code, said = command("resume", NAME)
        assert (code, "the QEMU at A's monitor has one, too" in said) == (1, True), said
        code, told = command("finish", str(stage.plan_file()))
        assert (code, "there is nothing to finish" in told) == (1, True), told
        assert another.running
        end = re.search(r"end it, and then resume: (nbd-migrate .*? quit)", said)
        assert end, said
        assert run(NBD_MIGRATE, *shlex.split(end[1])[1:], seconds=SECONDS).returncode == 0
        another.wait(SECONDS)
    code, said = command("resume", NAME)
    assert code == 0, said
    is_on_b(stage)


def test_what_cannot_be_removed_is_told_until_it_is_gone(stage: Scene) -> None:
    """Neither is it forgotten, nor does the next run begin over it."""
    kill_at(stage, 8, guards=True)
    assert stage.overlay.exists()
    stage.overlay.write_bytes(b"somebody's" * 1000)
    for name in ("abort", "resume"):
        code, said = command(name, NAME)
        assert (code, "the guest runs on A as before; but what was made on" in said) == (1, True), said
        assert f"nbd-migrate abort {NAME} clears it away" in command("cleanup", NAME)[1]
    code, said = command("run", str(stage.plan_file()), "--name", NAME)
    assert (code, f"when that is mended: nbd-migrate abort {NAME}" in said or "remove it" in said) == (
        1,
        True,
    ), said
    assert f"to clear that away: nbd-migrate abort {NAME}" in command("status", NAME)[1]
    for path in (stage.overlay, stage.overlay.with_name(f"{stage.overlay.name}.map")):
        path.unlink()
    code, said = command("abort", NAME)
    assert code == 0, said
    is_on_a_as_before(stage)


def test_a_migration_is_forgotten_by_force_and_what_is_left_is_told(stage: Scene) -> None:
    kill_at(stage, 9, guards=True)
    code, said = command("cleanup", "--force", NAME)
    assert code == 0
    started = {process.pid for role in (Role.SERVER, Role.OVERLAY) for process in role.find(stage.directory)}
    assert {int(pid) for pid in re.findall(r"process (\d+)", said)} >= started, said
    assert command("list") == (0, "")
    for role in (Role.SERVER, Role.OVERLAY, Role.B):
        for process in role.find(stage.directory):
            process.kill()


def test_a_guest_whose_monitors_cannot_be_found_is_left_alone(stage: Scene) -> None:
    """As where sockets were forwarded, and the forwarding has ended: it runs on B all the same."""
    kill_at(stage, ARRIVAL, guards=True, call="pwrite64")
    stage.wait_until_guest_works("b")
    for address in (stage.monitor_a, stage.monitor_b):
        address.rename(address.with_suffix(".hidden"))
    for name in ("abort", "resume"):
        code, said = command(name, NAME)
        assert code == 1, said
        assert "it is not known where the guest is" in said or "it cannot be seen where the guest is" in said
    for address in (stage.monitor_a, stage.monitor_b):
        address.with_suffix(".hidden").rename(address)
    stage.wait_until_guest_works("b")
    assert command("resume", NAME)[0] == 0
    is_on_b(stage)


def test_what_a_guest_has_written_on_b_is_not_removed_when_both_qemus_have_ended(stage: Scene) -> None:
    kill_at(stage, ARRIVAL, guards=True, call="pwrite64")
    stage.wait_until_guest_works("b")
    for role in (Role.A, Role.B):
        for process in role.find(stage.directory):
            process.kill()
    wait_until(lambda: not Role.A.find(stage.directory) + Role.B.find(stage.directory), "they end")
    code, said = command("abort", NAME)
    assert (code, "it is too late, and nothing was touched: the guest has stopped" in said) == (1, True), said
    assert stage.overlay.exists()
    code, said = command("resume", NAME)
    assert code == 0, said
    assert stage.wrong_sectors(interrupted=True) == []


def test_a_guest_that_has_ended_after_all_was_done_is_started_again(stage: Scene) -> None:
    with Process(
        [NBD_MIGRATE, "run", stage.plan_file(), "--name", NAME], stage.directory / "run.log"
    ) as made:
        assert made.wait(SECONDS) == 0
    for process in Role.B.find(stage.directory):
        process.kill()
    wait_until(lambda: not Role.B.find(stage.directory), "it ends")
    code, said = command("resume", NAME, "--boot")
    assert code == 0, said
    assert Role.B_AGAIN.find(stage.directory)
    wait_until(lambda: not list(stage.directory.glob("*.supervisor")), "no supervisor stays", SECONDS)


def test_a_second_name_does_not_get_the_image_of_a_migration_that_is_not_over(stage: Scene) -> None:
    kill_at(stage, 9, guards=True)
    code, said = command("run", str(stage.plan_file()), "--name", "another")
    assert (code, f"is that of migration {NAME}" in said) == (1, True), said
    assert command("abort", NAME)[0] == 0
    is_on_a_as_before(stage)


def phase_of(name: str) -> Phase | None:
    """What a migration has come to; None where nothing is written yet."""
    with contextlib.suppress(MigrationError):
        return journal.last(name).phase
    return None


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Scene]:
    """A guest whose disk is so large that its own reads do not complete it, however slow this machine is."""
    with scene(tmp_path) as made:
        made.change("limits", speed=1 << 13)
        yield made


def test_what_is_known_of_a_migration_is_told(slow: Scene) -> None:
    stage = slow
    assert command("list") == (0, "")
    with Process(
        [NBD_MIGRATE, "run", stage.plan_file(), "--name", NAME], stage.directory / "run.log"
    ) as made:
        wait_until(lambda: phase_of(NAME) is Phase.STREAM, "it streams", SECONDS)
        wait_until(lambda: "stream: " in command("status", NAME)[1], "it moves", SECONDS)
        code, told = command("status", NAME, "--json")
        values = json.loads(told)
        assert (values["phase"], values["actor"], values["over"]) == ("stream", made.pid, False)
        assert values["progress"]["total"] == len(stage.original)
        assert values["history"][0]["phase"] == "prepared"
        assert f"process {made.pid} is at work" in command("list")[1]
        for busy in ("resume", "abort", "cleanup"):
            code, said = command(busy, NAME)
            assert code == 1
            assert f"process {made.pid} is at work" in said or "is not over" in said
        code, said = command("finish", str(stage.directory / "plan.toml"))
        assert (code, f"process {made.pid} is at work on this migration already" in said) == (1, True), said
        made.kill()
    wait_until(lambda: not lives(made.pid), "it is dead")
    code, told = command("status", NAME)
    assert f"nobody is at work; to go on: nbd-migrate resume {NAME}" in told
    assert command("status", NAME, "--watch")[1] == told
    with monitor(stage.monitor_b) as b:
        assert b.state == "running"
    code, said = command("cleanup", NAME)
    assert (code, "is not over (stream)" in said) == (1, True)


def test_a_migration_that_was_interrupted_is_not_begun_again_unawares(stage: Scene) -> None:
    kill_at(stage, 5, guards=True)
    code, said = command("run", str(stage.plan_file()), "--name", NAME)
    assert code == 1
    assert f"nbd-migrate resume {NAME} takes it up, nbd-migrate abort {NAME} takes it back" in said
    assert command("abort", NAME)[0] == 0
    is_on_a_as_before(stage)


@pytest.mark.representative
def test_the_guests_name_is_the_migrations_unless_one_is_given(stage: Scene) -> None:
    """One whose QEMU was given none is called as its disk."""
    with Process([NBD_MIGRATE, "run", stage.plan_file()], stage.directory / "run.log") as made:
        assert made.wait(SECONDS) == 0
    assert journal.names() == ["a"]
