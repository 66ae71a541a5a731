"""A migration whose host B hangs: abort says what it waits for, and for how long."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.commands.abort import abort
from recipes.errors import MigrationError
from recipes.migrate.journal import Journal
from recipes.migrate.progress import Report
from recipes.migrate.state import Disk, Phase, Process, Role, State
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source

PREFIX = ("sh", "-c", "exec sleep 1000")
SECONDS = 3.0


class Notes(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def begun(directory: Path, phase: Phase) -> None:
    """Leave a migration that has started three processes on B, which hangs."""
    plan = Plan(
        Source(qmp=str(directory / "a.qmp"), image="/no.raw"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(
            qemu=("qemu",), image="/no.img", qmp=str(directory / "b.qmp"), migration="unix:/no", shell=PREFIX
        ),
        limits=Limits(connect=1.0, command=SECONDS),
    )
    started = tuple(Process(role, 4711, "mark") for role in (Role.QEMU, Role.OVERLAY))
    journal = Journal.begin("vm")
    state = State("vm", plan, phase, disks=(Disk("/no.raw", "/no.img", 1 << 20),), processes=started)
    journal.append(replace(state, made=("/no.img",)))
    journal.close()


@pytest.mark.parametrize(
    ("phase", "questions"),
    [
        (Phase.SWITCH_OVER, ["what has become of B's QEMU"]),
        # Of the other process B is not asked any more.
        (Phase.LAUNCH, ["what has become of B's QEMU", "whether B's QEMU is still there"]),
    ],
)
@pytest.mark.sampled(1)
def test_what_is_waited_for_is_said(
    phase: Phase, questions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    begun(tmp_path, phase)
    report = Notes()
    with pytest.raises(MigrationError, match=r"no answer within 3 s"):
        asyncio.run(abort("vm", report))
    assert report.said == [
        f"asking host B by 'sh -c 'exec sleep 1000'' {question}; it has 3 s to answer (limits.command)"
        for question in questions
    ]
