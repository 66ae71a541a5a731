"""Results as markdown: one text for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.contenders import Contender
from tests.bench.measure import Result
from tests.bench.memory import KIB, MOST, MOST_FOR_ONE_MORE, Memory
from tests.bench.rows import Row, Unit

BY_HAND = "## What was tried, and what it gave"

INTRODUCTION = """\
# Benchmarks

Written by `.venv/bin/python -m tests.bench --output docs/benchmarks.md`; `make bench` prints the same.
In one run on one machine every server is given the same load, in interleaved rounds: each server once
per round, in turn. The client is fio, and where it tends to be slower than the servers also one that
does little but count replies (tests/bench/counting.py). A figure is the median of the rounds, with the lowest
and highest behind it; × is the ratio of the medians, nbdserve's to that server's.
"""

NOTES = """\
A † marks figures where the client itself had no processor time left: the server may be faster than that.
Processors are how many of them the server and the client's busiest connection kept busy (medians); the
server's processor time per operation or per MiB says more than the rate where the client is the limit.
"""


def introduction(contenders: Sequence[Contender], machine: Mapping[str, str]) -> str:
    """The start of the page: how it is measured, on what, and who takes part."""
    lines = [[contender.name, contender.version(), contender.remark] for contender in contenders]
    return "\n".join(
        [
            INTRODUCTION,
            *(f"- {what}: {value}" for what, value in machine.items()),
            "",
            table(["server", "version", "options"], lines),
        ]
    )


def section(results: Sequence[Result]) -> str:
    """One row of the benchmark: a line for every contender, and whether the targets are met."""
    row, ours = results[0].row, results[0]
    cost = "µs/op" if row.unit is Unit.OPERATIONS else "ms/MiB"
    header = ["server", row.unit.value, "lowest..highest", "×", f"server {cost}", "processors: server"]
    lines = [
        [
            result.contender.name,
            f"{result.rate:.{_digits(row)}f}{' †' if result.is_limited_by_client else ''}",
            f"{result.lowest:.{_digits(row)}f}..{result.highest:.{_digits(row)}f}",
            "" if result is ours else f"{ours.rate / result.rate:.2f}",
            f"{result.median(lambda sample: sample.server_cost):.2f}",
            f"{result.median(lambda sample: sample.server_processors):.2f}",
            f"{result.median(lambda sample: sample.client_processor):.2f}",
        ]
        for result in results
    ]
    return "\n".join([f"\n## {row.name}\n", table([*header, "client"], lines), "", *targets(results)])


def summary(rows: Sequence[Sequence[Result]]) -> str:
    """All rows at a glance: nbdserve against the better peer of each, in speed and in processor time."""
    header = ["row", "target", "×", "", "better peer", "processor time ×", "of"]
    lines = []
    for results in rows:
        ours, row = results[0], results[0].row
        peers = [result for result in results[1:] if result.contender.name in row.targets]
        if not peers:
            continue
        best = max(peers, key=lambda result: result.rate)
        cheapest = min(results[1:], key=_cost)
        ratio, least = ours.rate / best.rate, row.targets[best.contender.name]
        mark = "met" if ratio >= least else "MISSED †" if ours.is_limited_by_client else "MISSED"
        saved = f"{_cost(ours) / _cost(cheapest):.2f}" if _cost(cheapest) else "-"
        name = best.contender.name
        lines.append([row.name, f"{least:g}", f"{ratio:.2f}", mark, name, saved, cheapest.contender.name])
    return "\n".join(["## All rows\n", table(header, lines), ""])


def _cost(result: Result) -> float:
    return result.median(lambda sample: sample.server_cost)


def memory_section(measured: Sequence[Memory]) -> str:
    """What clients cost in memory, and whether nbdserve's targets are met."""
    header = ["server", "one client, MiB", "idle clients", "each, KiB", "answered in the end"]
    lines = [
        [
            memory.contender.name,
            f"{memory.with_one / (KIB * KIB):.1f}",
            str(memory.idle),
            f"{memory.for_one_more / KIB:.0f}",
            str(memory.answered),
        ]
        for memory in measured
    ]
    ours = measured[0]
    held = ours.answered == ours.idle
    verdicts = [
        (f"below {MOST >> 20} MiB with one client", ours.with_one < MOST),
        (
            f"below {MOST_FOR_ONE_MORE >> 20} MiB for each idle one more",
            ours.for_one_more < MOST_FOR_ONE_MORE,
        ),
        (f"{ours.idle} idle clients hold", held),
    ]
    told = [f"Target {what}: {'met' if kept else 'MISSED'}.\n" for what, kept in verdicts]
    return "\n".join(["## Memory\n", table(header, lines), "", *told])


def targets(results: Sequence[Result]) -> list[str]:
    """A sentence for each target of the row that was measured."""
    row, ours = results[0].row, results[0]
    return [
        f"Target ≥ {target:g} × {result.contender.name}: "
        f"{'met' if ours.rate / result.rate >= target else 'MISSED'} ({ours.rate / result.rate:.2f}).\n"
        for result in results[1:]
        if (target := row.targets.get(result.contender.name)) is not None
    ]


def _digits(row: Row) -> int:
    return 1 if row.unit is Unit.OPERATIONS else 0


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up in a terminal."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def text(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([text(header), text(["-" * width for width in widths]), *map(text, lines)])


def written_by_hand(page: Path) -> str:
    """What stands on the page since before, from the heading BY_HAND on."""
    _, heading, rest = (page.read_text() if page.exists() else "").partition(BY_HAND)
    return f"\n{heading}{rest}" if heading else ""
