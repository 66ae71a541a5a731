"""The journal of a migration: what is kept, what a killed writer leaves, and who may write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from recipes.errors import MigrationError
from recipes.migrate import journal
from recipes.migrate.journal import Journal, check_name, usable_name
from recipes.migrate.lock import JournalBusyError
from recipes.migrate.state import Arrival, Disk, Phase, Process, Role, State
from recipes.plans.plan import Destination, Export, Plan, Source

PLAN = Plan(
    Source(qmp="/run/a.qmp", image="/a.raw", shell=("ssh", "a.example")),
    Export(uri="nbd://192.0.2.1/vm"),
    Destination(qemu=("qemu", "-m", "2G"), image="/b.raw", qmp="/run/b.qmp", migration="tcp:192.0.2.2:4444"),
)
FULL = State(
    "vm",
    PLAN,
    Phase.STREAM,
    disks=(Disk("/a.raw", "/b.raw", 1 << 30),),
    processes=(Process(Role.QEMU, 4711, "unix:/run/b.qmp"),),
    capabilities=("events",),
    arrival=Arrival(12, 3456, 1 << 20),
    arrived=1000.5,
    recoveries=2,
)


@pytest.fixture(autouse=True)
def _state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_state_comes_back_as_it_was_written() -> None:
    assert State.from_json(FULL.to_json()) == FULL
    assert "\n" not in FULL.to_json()


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", '{"version": 1}', '{"version": 2}', "{", "\0"])
def test_what_is_no_state_is_refused_in_one_line(line: str) -> None:
    with pytest.raises(MigrationError) as caught:
        State.from_json(line)
    assert "\n" not in str(caught.value)


def test_a_process_takes_the_place_of_the_one_before() -> None:
    again = FULL.with_process(Process(Role.QEMU, 4712, "unix:/run/b.qmp"))
    assert [each.pid for each in again.processes] == [4712]


def test_the_last_state_is_read_back_without_the_lock() -> None:
    kept = Journal.begin("vm")
    kept.append(replace(FULL, phase=Phase.EXPORT))
    written = kept.append(FULL)
    assert journal.last("vm") == written == replace(FULL, time=written.time)
    assert [state.phase for state in journal.history("vm")] == [Phase.EXPORT, Phase.STREAM]
    assert journal.names() == ["vm"]
    kept.close()


def test_half_a_line_that_a_killed_process_left_is_no_state_and_gives_way(tmp_path: Path) -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    path = tmp_path / "nbd-migrate/vm/journal"
    with path.open("ab") as file:
        file.write(b'{"version":1,"name":"vm","pla')
    assert journal.last("vm").phase is Phase.STREAM
    again = Journal.take_over("vm")
    again.append(replace(FULL, phase=Phase.COMPLETE))
    again.close()
    assert [state.phase for state in journal.history("vm")] == [Phase.STREAM, Phase.COMPLETE]


def test_a_migration_that_is_not_over_is_not_begun_anew() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    with pytest.raises(MigrationError, match="nbd-migrate resume vm takes it up, nbd-migrate abort vm"):
        Journal.begin("vm")
    kept = Journal.take_over("vm")
    kept.append(replace(FULL, phase=Phase.DONE, processes=()))
    kept.close()
    Journal.begin("vm").close()


def test_a_migration_that_has_left_something_behind_is_not_begun_anew() -> None:
    kept = Journal.begin("vm")
    kept.append(replace(FULL, phase=Phase.TAKEN_BACK))
    kept.close()
    with pytest.raises(MigrationError, match="nbd-migrate abort vm clears it away"):
        Journal.begin("vm")


def test_what_is_no_migrations_directory_is_not_taken_for_one(tmp_path: Path) -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    for name in ("vm2~", "a copy of vm", "v" * 41):
        (journal.base_directory() / name).mkdir()
        (journal.base_directory() / name / "journal").write_text(FULL.to_json() + "\n")
    assert journal.names() == ["vm"]
    assert [state.name for state in journal.of_destination(PLAN)] == ["vm"]


def test_a_migration_is_forgotten_with_all_that_a_killed_writer_has_left() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    for name in ("progress", "progress.new"):
        (kept.directory / name).write_text("{")
    journal.remove("vm")
    assert not kept.directory.exists()


def test_one_process_acts_at_a_time_and_is_named() -> None:
    kept = Journal.begin("vm")
    with pytest.raises(JournalBusyError, match=f"process {os.getpid()} is at work") as caught:
        Journal.take_over("vm")
    assert caught.value.pid == os.getpid()
    assert journal.actor("vm") == os.getpid()
    kept.close()
    assert journal.actor("vm") == 0


def test_whoever_has_inherited_the_lock_holds_it_when_the_first_is_killed() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[kept.lock.fd]
    ) as child:
        kept.close()
        with pytest.raises(JournalBusyError):
            Journal.take_over("vm")
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    Journal.take_over("vm").close()


def test_a_migration_is_forgotten_when_it_is_removed() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    with pytest.raises(JournalBusyError):
        journal.remove("vm")
    kept.close()
    journal.remove("vm")
    assert journal.names() == []
    with pytest.raises(MigrationError, match="there is no migration vm"):
        journal.last("vm")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 41, "é", "a\n"])
def test_what_cannot_be_a_directory_of_its_own_is_no_name(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)
    check_name(usable_name(name))


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "nbd-migrate").write_text("")
    with pytest.raises(MigrationError, match=r"Not a directory|File exists"):
        Journal.begin("vm")
