"""Drawings of a migration, as SVG. Only here is Matplotlib needed, which is no part of an installation."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from recipes.errors import MigrationError
from recipes.hosts.quoting import pasted
from recipes.migrate.state import Phase
from recipes.running.account import Account

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = (
    "the report's page needs Matplotlib, which is not here: install the distribution's python3-matplotlib, "
    "or what this installs: {pip}; --json needs none"
)

_BEFORE, _STILL, _OPEN, _AFTER, _BACK = "#4c78a8", "#e45756", "#f2a03d", "#54a24b", "#9d755d"
COLOURS: Mapping[Phase, str] = {
    **dict.fromkeys((Phase.PREPARED, Phase.EXPORT, Phase.OVERLAY, Phase.LAUNCH), _BEFORE),
    **dict.fromkeys((Phase.PRECOPY, Phase.MIGRATE), _BEFORE),
    Phase.SWITCH_OVER: _STILL,
    Phase.ARRIVED: _OPEN,
    Phase.STREAM: _OPEN,
    **dict.fromkeys((Phase.COMPLETE, Phase.SHUT_DOWN, Phase.DONE), _AFTER),
    **dict.fromkeys((Phase.TAKING_BACK, Phase.TAKEN_BACK, Phase.LOST), _BACK),
    **dict.fromkeys((Phase.RECOVERING, Phase.RECOVERED), _BACK),
}
"""A phase's: before the cut-over, while the guest stands still, while A is needed, after that, given up."""

MIB = 1 << 20


def draw(account: Account) -> dict[str, str]:
    """Return the drawings, by their titles; only those of which something is known.

    Raises MigrationError where Matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib
    except ImportError as error:
        pip = pasted([sys.executable, "-P", "-m", "pip", "install", "matplotlib"])
        raise MigrationError(MISSING.format(pip=pip)) from error
    # Text stays text, and the same migration has the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": account.name, "font.size": 9}):
        drawn = {"What came when": _timeline(account)}
        if len(account.samples) > 1:
            drawn["The disk's way to B"] = _progress(account)
        if account.waits:
            drawn["How long requests of the guest waited for A"] = _latency(account)
        return drawn


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Return a figure as an element of a page, without what stands before it and without metadata."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    _, begin, rest = text.getvalue().partition("<svg")
    return begin + rest


def _timeline(account: Account) -> str:
    shown = [stretch for stretch in account.stretches if stretch.seconds or stretch is account.stretches[-1]]
    figure, axes = _figure(0.6 + 0.28 * len(shown))
    for row, stretch in enumerate(shown):
        begin = stretch.begin - account.begin
        # What takes no time is seen all the same.
        axes.barh(
            row, stretch.seconds, left=begin, color=COLOURS[stretch.phase], edgecolor="none", height=0.7
        )
        axes.plot(begin, row, "|", color=COLOURS[stretch.phase], markersize=9)
        axes.annotate(
            f" {duration(stretch.seconds)}", (begin + stretch.seconds, row), va="center", fontsize="small"
        )
    axes.set_yticks(range(len(shown)), [stretch.phase.value for stretch in shown])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("seconds since the beginning")
    return _svg(figure)


def _progress(account: Account) -> str:
    figure, axes = _figure(2.8)
    since = account.cut_over or account.begin
    times = [sample.time - since for sample in account.samples]
    rates = [sample.rate / MIB for sample in account.samples]
    axes.fill_between(times, rates, color=_BEFORE, alpha=0.35, lw=0)
    axes.set_ylabel("MiB/s")
    axes.set_ylim(0.0, 1.1 * max(rates) or 1.0)
    axes.set_xlabel("seconds since the cut-over")
    share = axes.twinx()
    share.plot(times, [100 * sample.done / max(1, sample.total) for sample in account.samples], color=_OPEN)
    share.set_ylabel("% on B")
    share.set_ylim(0, 102)
    share.spines["top"].set_visible(False)
    return _svg(figure)


def _latency(account: Account) -> str:
    figure, axes = _figure(2.4)
    since = account.cut_over or account.begin
    times = [waits.time - since for waits in account.waits]
    milliseconds = [1000 * waits.seconds for waits in account.waits]
    axes.plot(times, milliseconds, ".-", color=_STILL, lw=0.8)
    axes.set_ylabel("ms, on average")
    axes.set_ylim(0.0, 1.1 * max(milliseconds) or 1.0)
    axes.set_xlabel("seconds since the cut-over")
    return _svg(figure)


def duration(seconds: float) -> str:
    """Return seconds for people: ``8 ms``, ``1.5 s``, ``3:05``, ``2:03:05``."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
