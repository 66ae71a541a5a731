"""The journal of a migration: what is kept, what a killed writer leaves, and who may write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from recipes.commands import overview
from recipes.commands.run import refuse_another
from recipes.errors import MigrationError
from recipes.migrate import journal
from recipes.migrate.journal import Journal, check_name, usable_name
from recipes.migrate.lock import JournalBusyError
from recipes.migrate.progress import Progress
from recipes.migrate.state import (
    BEFORE,
    OVER,
    Arrival,
    Disk,
    Phase,
    Prediction,
    Process,
    Role,
    Round,
    State,
    Tunnel,
)
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.bitmaps import Tracking

PLAN = Plan(
    Source(qmp="/run/a.qmp", image="/a.raw", shell=("ssh", "a.example")),
    Export(uri="nbd://192.0.2.1/vm"),
    Destination(qemu=("qemu", "-m", "2G"), image="/b.raw", qmp="/run/b.qmp", migration="tcp:192.0.2.2:4444"),
)
FULL = State(
    "vm",
    PLAN,
    Phase.STREAM,
    disks=(Disk("/a.raw", "/b.raw", 1 << 30, "inode 1:2 1073741824", "/a.raw.moved"),),
    processes=(Process(Role.QEMU, 4711, "unix:/run/b.qmp"),),
    capabilities=("events",),
    devices=("net0 (virtio-net-pci)",),
    command=("env", "-C", "/srv", "qemu-system-x86_64", "-m", "2G"),
    tunnel=Tunnel("/a.raw.export", "/a.raw.ram", "/a.raw.nbdserve.qmp"),
    arrival=Arrival(12, 3456, 1 << 20),
    arrived=1000.5,
    recoveries=2,
    exporter="/a.export",
    tracking=Tracking(("disk0",), "/a.raw.nbdserve.qmp"),
    rounds=(Round(0, 1 << 30, 10.5), Round(1, 1 << 20, 0.25)),
    precopied=(1 << 30) + (1 << 20),
    prediction=Prediction(1 << 16, 0.5, 0.01),
)


@pytest.fixture(autouse=True)
def _state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_state_comes_back_as_it_was_written() -> None:
    assert State.from_json(FULL.to_json()) == FULL
    assert "\n" not in FULL.to_json()


WRITTEN_BEFORE = (
    '{"version":1,"name":"vm","plan":{"source":{"qmp":"/run/a.qmp","image":"/a.raw","node":"","shell":["ssh",'
    '"a.example"],"bin":""},"export":{"uri":"nbd://192.0.2.1/vm"},"destination":{"qemu":["qemu","-m","2G"],'
    '"image":"/b.raw","qmp":"/run/b.qmp","migration":"tcp:192.0.2.2:4444","node":"disk0","shell":[],"bin":"",'
    '"engine":"overlay","owner":"","mode":""},"limits":{"connect":10.0,"command":15.0,"start":30.0,"migrate":'
    '3600.0,"switch_over":60.0,"stall":300.0,"recover":60.0,"stop":30.0,"reconnect_delay":10,'
    '"reconnect_timeout":60.0,"restarts":5,"connections":3,"speed":0},"finish":{"move_aside":""},"log":'
    '{"directory":""}},"phase":"stream","disks":[{"source":"/a.raw","target":"/b.raw","size":1073741824,'
    '"complete":false}],"processes":[{"role":"overlay","pid":4711,"mark":"/b.raw.overlay.pid"}],'
    '"capabilities":["events"],"made":[],"finish":"","arrival":null,"arrived":1000.5,"window":0.0,'
    '"recoveries":2,"time":0.0}'
)
"""A line from before plans had several disks."""


def test_a_journal_from_before_there_were_several_disks_means_what_it_meant() -> None:
    state = State.from_json(WRITTEN_BEFORE)
    [disk] = state.plan.disks
    assert disk == PlannedDisk("/a.raw", "/b.raw", "disk0")
    assert state.pending == (disk,)
    old = state.process(Role.OVERLAY, disk.drive)
    assert old == Process(Role.OVERLAY, 4711, "/b.raw.overlay.pid")
    new = Process(Role.OVERLAY, 4712, "/b.raw.overlay.pid", disk.drive)
    assert state.with_process(new).processes == (new,)
    assert State.from_json(state.to_json()) == state


def test_a_journal_from_before_hybrid_compared_by_default_does_not_compare() -> None:
    """Its server on A was not told to help with that."""
    told = json.loads(FULL.to_json())
    told["plan"]["destination"]["policy"] = "hybrid"
    assert not State.from_json(json.dumps(told)).plan.verifies
    hybrid = replace(PLAN, destination=replace(PLAN.destination, policy="hybrid"))
    now = replace(FULL, plan=hybrid.settled)
    assert now.plan.verifies
    assert State.from_json(now.to_json()) == now


def test_processes_of_several_disks_are_told_apart() -> None:
    first, second = (Process(Role.OVERLAY, pid, "mark", f"disk{pid}") for pid in (1, 2))
    again = replace(first, pid=3)
    state = FULL.with_process(first).with_process(second).with_process(again)
    assert state.process(Role.OVERLAY, "disk1") == again
    assert state.process(Role.OVERLAY, "disk2") == second
    assert state.process(Role.QEMU) == FULL.processes[0]


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", '{"version": 1}', '{"version": 2}', "{", "\0"])
def test_what_is_no_state_is_refused_in_one_line(line: str) -> None:
    with pytest.raises(MigrationError) as caught:
        State.from_json(line)
    assert "\n" not in str(caught.value)


def changed(**values: object) -> str:
    """A line with other values, by the path to each."""
    told = json.loads(FULL.to_json())
    for path, value in values.items():
        place, *keys = path.split("__")
        inner = told
        for key in [place, *keys][:-1]:
            inner = inner[int(key) if key.isdigit() else key]
        inner[[place, *keys][-1]] = value
    return json.dumps(told)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100000,
        changed(disks=[]),
        changed(disks__0__target="/c.raw"),
        changed(time="x"),
        changed(time=1e300),
        changed(time=-1),
        changed(time=True),
        changed(arrived=1e300),
        changed(disks__0__size="x"),
        changed(disks__0__complete=1),
        changed(plan__destination__shell=5),
        changed(plan__destination__shell="ssh"),
        changed(processes__0__mark=None),
        changed(processes__0__role="nobody"),
        changed(phase="nowhere"),
        changed(arrival=[]),
        changed(arrival__more=1),
    ],
)
def test_values_of_other_kinds_are_refused_in_one_line(line: str) -> None:
    with pytest.raises(MigrationError, match="not a state of a migration") as caught:
        State.from_json(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100000, "{}", '{"time": 9e18}', '{"time": "x", "progress": {}}', "\0" * 9, "null"],
)
def test_a_progress_that_nobody_of_ours_has_written_is_none(content: str) -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    (kept.directory / "progress").write_text(content)
    assert journal.progress("vm") is None
    kept.note_progress(Progress(1, 2, 3.5, 4.0))
    told = journal.progress("vm")
    assert told
    assert told.progress == Progress(1, 2, 3.5, 4.0)
    kept.close()


def test_a_damaged_journal_is_nobody_elses_trouble() -> None:
    """One that is no file at all is told of, and not waited for."""
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    for name in ("bad", "fifo", "folder"):
        (journal.base_directory() / name).mkdir()
    (journal.base_directory() / "bad" / "journal").write_text("[" * 100000 + "\n")
    os.mkfifo(journal.base_directory() / "fifo" / "journal")
    (journal.base_directory() / "folder" / "journal").mkdir()
    assert [state.name for state in journal.of_destination(PLAN)] == ["vm"]
    for name in ("bad", "fifo", "folder"):
        with pytest.raises(MigrationError):
            journal.last(name)
    rows = list(overview.rows())
    assert len(rows) == 4
    assert "nobody is at work" in rows[-1]
    overview.to_be_forgotten("bad", force=True)
    journal.remove("bad")
    assert "bad" not in journal.names()


def test_what_somebody_is_at_work_on_is_not_forgotten_by_force_nor_what_it_has_told_as_left() -> None:
    """What one is told to remove then, the other one needs."""
    with closing(Journal.begin("vm")) as kept:
        kept.append(FULL)
        with pytest.raises(MigrationError, match=f"vm: process {os.getpid()} is at work"):
            overview.to_be_forgotten("vm", force=True)
    assert overview.to_be_forgotten("vm", force=True)


def test_an_entry_that_was_damaged_does_not_hide_the_last_one() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.append(replace(FULL, recoveries=3))
    kept.close()
    path = kept.directory / "journal"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\0" * (len(first) - 1) + b"\n" + b"".join(rest))
    assert journal.last("vm").recoveries == 3
    assert [state.recoveries for state in journal.history("vm")] == [3]


def test_what_somebody_else_has_put_beside_a_journal_stays() -> None:
    kept = Journal.begin("vm")
    kept.append(FULL)
    kept.close()
    (kept.directory / "notes").write_text("mine")
    journal.remove("vm")
    assert [path.name for path in kept.directory.iterdir()] == ["notes"]
    assert journal.names() == []


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
    with pytest.raises(MigrationError, match="nbd-migrate resume vm takes it up"):
        Journal.begin("vm")
    kept = Journal.take_over("vm")
    over = replace(FULL, phase=Phase.DONE, processes=(), exporter="", tunnel=None, tracking=None)
    kept.append(over)
    kept.close()
    Journal.begin("vm").close()


@pytest.mark.parametrize("phase", [each for each in Phase if each not in OVER])
def test_abort_is_named_only_as_long_as_the_guest_may_be_on_a(phase: Phase) -> None:
    """Afterwards it refuses. To begin another one, to forget it and to look at it say the same."""
    kept = Journal.begin("vm")
    kept.append(replace(FULL, phase=phase))
    kept.close()
    with pytest.raises(MigrationError) as begun:
        Journal.begin("vm")
    with pytest.raises(MigrationError) as forgotten:
        overview.to_be_forgotten("vm")
    with pytest.raises(MigrationError) as another:
        refuse_another("other", FULL.plan)
    seen = "\n".join(overview.lines("vm"))
    for said in (str(begun.value), str(forgotten.value), str(another.value), seen):
        onward = "recover vm --on a" if phase is Phase.RECOVERING else "resume vm"
        assert f"nbd-migrate {onward}" in said
        assert ("nbd-migrate abort vm" in said) == (phase in BEFORE), said


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


def test_an_image_of_the_same_name_on_another_host_is_another_one() -> None:
    there = replace(PLAN, destination=replace(PLAN.destination, host="ssh://b.example"))
    elsewhere = replace(PLAN, destination=replace(PLAN.destination, host="ssh://c.example"))
    begun = Journal.begin("vm")
    begun.append(replace(FULL, plan=there))
    begun.close()
    assert [state.name for state in journal.of_destination(there)] == ["vm"]
    assert journal.of_destination(elsewhere) == []
    assert journal.of_destination(PLAN) == []
