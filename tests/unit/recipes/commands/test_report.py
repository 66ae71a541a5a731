"""The report of a migration: what its journal and its samples tell, as a page that loads nothing or JSON."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipes.cli.main import main
from recipes.migrate.journal import Journal
from recipes.migrate.state import Arrival, Disk, Phase, State
from recipes.plans.hooks import Hook
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.running.account import account
from recipes.running.charts import COLOURS
from recipes.running.samples import Sample, Samples

MIB = 1 << 20
BEGIN = 1_900_000_000.0
PHASES = {
    Phase.PREPARED: 0.0,
    Phase.EXPORT: 0.5,
    Phase.OVERLAY: 1.0,
    Phase.LAUNCH: 1.5,
    Phase.PRECOPY: 2.0,
    Phase.MIGRATE: 3.0,
    Phase.SWITCH_OVER: 7.0,
    Phase.ARRIVED: 7.25,
    Phase.STREAM: 7.5,
    Phase.COMPLETE: 107.25,
    Phase.SHUT_DOWN: 107.5,
    Phase.DONE: 108.0,
}
EVIL = "/images/<script>&'\"\u2028.raw"


def states(until: Phase = Phase.DONE) -> list[State]:
    """The states of a migration that has come to a phase."""
    plan = Plan(
        Source(qmp="/a", image=EVIL),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), image="/vm.raw", qmp="/b", migration="unix:/no"),
    )
    state, found = State("vm", plan, disks=(Disk(EVIL, "/vm.raw", 1000 * MIB),)), []
    for phase, when in PHASES.items():
        state = replace(state, phase=phase, time=BEGIN + when)
        if phase is Phase.ARRIVED:
            arrival = Arrival(downtime_ms=250, total_ms=4250, ram_bytes=512 * MIB)
            state = replace(state, arrival=arrival, arrived=state.time, hooks_begun=(Hook.AFTER_CUTOVER,))
        if phase is Phase.COMPLETE:
            state = replace(state, window=100.0, disks=(replace(state.disks[0], complete=True),))
        found.append(state)
        if phase is until:
            break
    return found


def samples(seconds: int = 100) -> list[Sample]:
    """A sample for each second of the stream."""
    return [
        Sample(BEGIN + 7.5 + each, each * 10 * MIB, 1000 * MIB, 10.0 * MIB, 4 * each, each * 0.02)
        for each in range(seconds)
    ]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A migration that is known here; the directory of the journals' home."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    keep(states(), samples())
    return tmp_path


def keep(history: list[State], taken: list[Sample]) -> None:
    """Leave these states and samples."""
    journal = Journal.begin("vm")
    for state in history:
        journal.append(state)
    # It writes down when it was told.
    lines = "".join(f"{state.to_json()}\n" for state in history)
    (journal.directory / "journal").write_text(lines)
    journal.close()
    noted = Samples(journal.directory)
    for sample in taken:
        noted.note(sample)


def test_an_account_says_what_a_migration_was_like() -> None:
    told = account(states(), samples(), BEGIN + 10_000)
    assert (told.begin, told.end, told.cut_over) == (BEGIN, BEGIN + 108, BEGIN + 7.25)
    assert (told.downtime, told.ram_time, told.ram_bytes) == (0.25, 4.25, 512 * MIB)
    assert (told.window, told.rate, told.disk_bytes) == (100.0, 10 * MIB, 1000 * MIB)
    stretches = {stretch.phase: stretch.seconds for stretch in told.stretches}
    assert (stretches[Phase.MIGRATE], stretches[Phase.SWITCH_OVER], stretches[Phase.DONE]) == (4.0, 0.25, 0.0)
    assert list(stretches) == list(PHASES)
    assert told.waits[0].requests == 4
    assert told.waits[0].seconds == pytest.approx(0.005)
    assert (told.hooks_begun, told.hooks_ended) == (("after_cutover",), ())


def test_every_phase_has_a_colour() -> None:
    assert set(COLOURS) == set(Phase)


def test_one_of_a_migration_that_goes_on_ends_now() -> None:
    told = account(states(Phase.STREAM), samples(20), BEGIN + 27.5)
    assert (told.end, told.window) == (BEGIN + 27.5, 20.25)
    assert told.stretches[-1].seconds == 20.0
    assert told.rate == pytest.approx(10 * MIB)


@pytest.mark.parametrize("phase", PHASES)
def test_one_of_a_migration_that_has_come_anywhere_says_only_what_is_known(phase: Phase) -> None:
    told = account(states(phase), [], BEGIN + 500)
    assert (told.cut_over is None) == (PHASES[phase] < 7.25)
    assert (told.window is None) == (told.cut_over is None)
    assert told.waits == ()
    json.dumps(told.to_json())


def test_a_clock_that_was_set_back_makes_no_negative_time() -> None:
    history = states()
    history[4] = replace(history[4], time=BEGIN - 1000)
    told = account(history, samples(), BEGIN)
    assert all(stretch.seconds >= 0 for stretch in told.stretches)


def test_an_overlay_that_counts_anew_makes_no_negative_waits() -> None:
    taken = samples(10)
    taken[5:] = [replace(sample, misses=each, waited=each / 100) for each, sample in enumerate(taken[5:])]
    assert all(waits.requests > 0 and waits.seconds >= 0 for waits in account(states(), taken, 0).waits)


class Checked(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_has_everything_and_loads_nothing(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "vm"]) == 0
    assert capsys.readouterr().out == "vm: vm.html is the report\n"
    text = (kept / "vm.html").read_text()
    page = Checked()
    page.feed(text)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ET.fromstring(drawing)
    for words in (
        "done: the guest and its disk are on B",
        "250 ms: for so long the guest stood still",
        "1:40: from then until nothing on A was needed",
        "512 MiB in 4.2 s",
        "1000 MiB, 10 MiB/s on average",
        "396 requests of the guest, 5 ms each",
        "hook after_cutover",
        "called, and interrupted",
        EVIL,
    ):
        assert words in page.text, words


def test_a_page_is_written_where_it_is_wanted(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "vm", "--output", "x y.html"]) == 0
    assert (kept / "x y.html").stat().st_size > 10_000
    assert main(["report", "vm", "--output", "no/where.html"]) == 1
    assert capsys.readouterr().err == "nbd-migrate: no/where.html: No such file or directory\n"


def test_a_migration_that_has_hardly_begun_has_a_page(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(states(Phase.PREPARED), [])
    assert main(["report", "vm"]) == 0
    assert "prepared" in (kept / "vm.html").read_text()


def test_without_matplotlib_it_is_said_how_to_get_it_and_json_needs_none(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "vm"]) == 1
    assert re.fullmatch(
        rf"nbd-migrate: the report's page needs .*: {sys.executable} -P -m pip install matplotlib; .*\n",
        capsys.readouterr().err,
    )
    assert not (kept / "vm.html").exists()
    assert main(["report", "vm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["phase"], told["downtime"], len(told["samples"])) == ("done", 0.25, 100)
    assert [stretch["phase"] for stretch in told["stretches"]] == [phase.value for phase in PHASES]


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["report", "nobody"], 1, "there is no migration nobody: see nbd-migrate list"),
        (["report", "vm", "--json", "--output", "x"], 2, "--json goes to standard output"),
        (["report"], 2, "the following arguments are required: NAME"),
        (["report", "../x"], 2, "cannot be a migration's name"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], code: int, complaint: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert complaint in captured.err
