"""``nbd-migrate report``: one page about a migration, or the same as JSON. It touches no host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from nbdserve.common.sizes import format_size
from recipes.commands.overview import PHASES
from recipes.migrate.journal import actor, directory_of, history, progress
from recipes.running.account import Account, account
from recipes.running.charts import draw, duration
from recipes.running.samples import load
from recipes.running.window import window_of

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2em 1.2em .2em 0; vertical-align: top; }
th { font-weight: 600; color: #555; }
svg { max-width: 100%; height: auto; }
"""


def account_of(name: str) -> Account:
    """Return what a migration was like. Raises MigrationError where there is none."""
    states, now = history(name), time.time()
    window = window_of(states[-1], progress(name), at_work=actor(name) != 0)
    return account(states, load(directory_of(name)), now, window)


def write(name: str, output: Path) -> None:
    """Write the page. Raises MigrationError where there is no such migration, or no Matplotlib; OSError."""
    text = page(account_of(name))
    output.write_text(text, encoding="utf-8")


def page(told: Account) -> str:
    """Return the page: HTML that loads nothing from anywhere."""
    drawings = "".join(f"<h2>{escape(title)}</h2>\n{svg}\n" for title, svg in draw(told).items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Migration {escape(told.name)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Migration {escape(told.name)}</h1>
<p>{escape(PHASES[told.phase])}, {stamp(told.end)}</p>
{_table(_facts(told))}
{drawings}<h2>Phases</h2>
{_table(_phases(told), ("since", "phase", "", "took"))}
<h2>Disks</h2>
{_table(_disks(told), ("on A", "on B", "size", ""))}
</body>
</html>
"""


def _facts(told: Account) -> Iterator[tuple[str, ...]]:
    yield "began", stamp(told.begin)
    if told.ram_time is not None and told.ram_bytes is not None:
        yield "RAM", f"{format_size(told.ram_bytes)} in {duration(told.ram_time)}"
    if told.downtime is not None:
        yield "downtime", f"{duration(told.downtime)}: for so long the guest stood still"
    if told.cut_over is not None and told.window is not None:
        yield "cut-over", stamp(told.cut_over)
        predicted = "" if told.predicted is None else f" ({duration(told.predicted)} were predicted)"
        yield "window", f"{duration(told.window)}: from then until nothing on A was needed{predicted}"
    if told.needed:
        left = "" if told.left is None else f", for {duration(told.left)} at the rate of late"
        yield "A is needed", f"for {format_size(told.needed)} that are not on stable storage on B{left}"
    elif told.needed == 0:
        yield "A is needed", "no more: all of the guest's disks is on stable storage on B"
    if told.rounds:
        count = told.rounds[-1].number + 1
        yield "before the cut-over", f"{format_size(told.precopied)} were copied, rounds: {count}"
    if told.rate is not None:
        yield "disk", f"{format_size(told.disk_bytes)}, {format_size(int(told.rate))}/s on average"
    if seeded := sum(disk.seeded for disk in told.disks):
        yield "from seeds", f"{format_size(seeded)} of it, which was not sent"
    verified, written = (sum(getattr(disk, key) for disk in told.disks) for key in ("verified", "written"))
    if verified or written:
        yield "verified", f"{format_size(verified)} are as on A, {format_size(written)} are the guest's own"
    elif told.verifies:
        yield "verified", "not yet: what is copied is compared with A in the end"
    else:
        yield "verified", "no: what was copied is not compared with A (run --verify)"
    if told.interruptions:
        yield "interruptions", f"{told.interruptions} of the stream, which was taken up again"
    waited = sum(waits.requests for waits in told.waits)
    if waited:
        mean = sum(waits.requests * waits.seconds for waits in told.waits) / waited
        yield "waited for A", f"{waited} requests of the guest, {duration(mean)} each on average"
    for hook in told.hooks_begun:
        yield f"hook {hook}", "called" if hook in told.hooks_ended else "called, and interrupted"


def _phases(told: Account) -> Iterator[tuple[str, ...]]:
    for stretch in told.stretches:
        yield stamp(stretch.begin), stretch.phase.value, PHASES[stretch.phase], duration(stretch.seconds)


def _disks(told: Account) -> Iterator[tuple[str, ...]]:
    for disk in told.disks:
        whole = "complete on B" if disk.complete else "not complete on B"
        yield disk.source, disk.target, format_size(disk.size), whole


def _table(rows: Iterator[tuple[str, ...]], heads: Sequence[str] = ()) -> str:
    lines = ["<table>"]
    if heads:
        lines.append(f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>")
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def stamp(seconds: float) -> str:
    """Return a time as a date, here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
