"""``nbd-migrate speed``, as far as it goes without a run that takes what is asked."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from recipes.cli.main import main
from recipes.migrate.journal import Journal
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.processes import Argument, Process
from tests.support.vms import NBD_MIGRATE


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """A migration that streams, of which nobody is at work."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    plan = Plan(
        Source(qmp="/a", image="/no.raw"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), image="/no.img", qmp="/b", migration="unix:/no"),
    )
    made = State("vm", plan, Phase.STREAM, disks=(Disk("/no.raw", "/no.img", 1 << 20),))
    journal = Journal.begin("vm")
    journal.append(made)
    journal.close()
    return made


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["vm"], 2, "speed: give either SIZE or --finish-by"),
        (["vm", "1M", "--finish-by", "06:00"], 2, "speed: give either SIZE or --finish-by"),
        (["vm", "fast"], 2, "SIZE 'fast' is not a size"),
        (["vm", "8E"], 2, "SIZE: 9223372036854775808 is too large: at most 9223372036854775807 bytes"),
        (["vm", "--finish-by", "25:00"], 2, "--finish-by '25:00' is no time: write HH:MM, or a date as in"),
        (["vm", "--finish-by", "2001-01-01"], 2, "--finish-by '2001-01-01' is not to come"),
        (["other", "1M"], 1, "there is no migration other: see nbd-migrate list"),
        (
            ["vm", "1M"],
            1,
            "nobody is at work on vm, so nothing was changed: nbd-migrate resume vm takes it up",
        ),
        (["vm", "1M", "--fast"], 2, "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], code: int, complaint: str, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", *words]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert complaint in captured.err


def test_of_a_disk_that_is_complete_nothing_is_asked(
    state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal.take_over("vm")
    whole = tuple(dataclasses.replace(disk, complete=True) for disk in state.disks)
    journal.append(dataclasses.replace(state, phase=Phase.COMPLETE, disks=whole))
    try:
        assert main(["speed", "vm", "1M"]) == 1
    finally:
        journal.close()
    assert "vm: every block is on B already, so nothing was changed" in capsys.readouterr().err


def test_a_run_does_not_take_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("[source]\n")
    assert main(["run", "--speed", "1M", "--finish-by", "06:00", str(plan)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("what", ["speed", "cutover"])
def test_who_is_interrupted_while_he_waits_asks_no_more(
    state: State, tmp_path: Path, what: str, number: signal.Signals
) -> None:
    """As by the end of his terminal: a guest would go at a time at which nobody expects it."""
    hybrid = dataclasses.replace(state.plan.destination, policy="hybrid")
    plan = dataclasses.replace(state.plan, destination=hybrid)
    journal = Journal.take_over("vm")
    journal.append(dataclasses.replace(state, plan=plan, phase=Phase.LAUNCH))
    words: list[Argument] = [NBD_MIGRATE, what, "vm", *(["1M"] if what == "speed" else [])]
    asked = journal.directory / f"{what}.asked"
    try:
        with Process(words, tmp_path / "log") as process:
            process.wait_for(asked.exists, "it is asked")
            process.signal(number)
            assert process.wait() == 130
    finally:
        journal.close()
    assert not asked.exists()
