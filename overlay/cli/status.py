"""How copying goes, for people: one look, a live line, and waiting until everything is here."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from nbdserve.common.clock import now
from nbdserve.common.errors import OperatorError
from nbdserve.common.program import EXIT_DONE
from nbdserve.common.sizes import format_size
from nbdserve.qmp.client import GoneError
from overlay.cli.remote import Remote, connected

LIVE, PLAIN = 0.5, 5.0
"""Seconds between two looks: on a terminal, and between two lines where there is none."""
WATCH = 1.0
QUIET = 3.0
"""Seconds of a server's silence from which on it is worth a word."""
_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

Status = Mapping[str, Any]
"""What ``query-overlay`` tells."""


class StreamError(OperatorError):
    """Not everything will come here by itself."""


def text(told: Status) -> str:
    """Return all that matters, on a few lines."""
    rows = [
        ("image", str(told["image"])),
        ("disk", _disk(told)),
        ("job", _job(told)),
        ("guest", _guest(told)),
        ("needed", _needed(told)),
        ("copied", _copied(told)),
        ("seed", _seed(told)),
        ("verified", _verified(told)),
        ("misses", _misses(told)),
        ("channel", _channel(told)),
        ("mirror", _mirror(told)),
        *(("source", _source(source, told["complete"])) for source in told["sources"]),
    ]
    return "\n".join(f"{name:<8} {value}" for name, value in rows if value)


def line(told: Status) -> str:
    """Tell how it goes, on one line."""
    parts = [
        f"{_percent(told)} of {format_size(told['total'])}",
        _pace(told) if told["phase"] == "running" else _phase(told),
    ]
    if told["window"] is not None:
        parts.append(f"window {duration(told['window'])}")
    if told["mirror"] is not None and told["mirror"]["state"] != "in-sync":
        parts.append(f"the mirror is {told['mirror']['state']}")
    lost = [source for source in told["sources"] if not source["connected"]]
    if lost and len(lost) == len(told["sources"]) and not told["complete"]:
        parts.append("the backing is lost")
    quiet = [source["quiet"] for source in told["sources"] if source["connected"]]
    if quiet and min(quiet) >= QUIET and not told["complete"]:
        parts.append(f"the backing says nothing for {duration(min(quiet))}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as ``8 s``, ``3:05`` or ``2:03:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


async def watch(monitor: str, *, as_json: bool) -> int:
    """Show it each second until everything is here; GoneError when the daemon ends before."""
    async with connected(monitor) as remote:
        with _Show(as_json=as_json, every=WATCH) as show:
            while True:
                told = await remote.status()
                show.show(told)
                if told["complete"]:
                    return EXIT_DONE
                await asyncio.sleep(WATCH)


async def wait(monitor: str, limit: float | None) -> int:
    """Wait until everything is here. Raises GoneError, StreamError with the reason when it will not be."""
    deadline = None if limit is None else now() + limit
    async with connected(monitor) as remote:
        with remote.events(*_ENDS) as listener, _Show(as_json=False, every=PLAIN) as show:
            event: str | None = None
            while True:
                told = await _look(remote, event)
                show.show(told)
                if told["complete"]:
                    return EXIT_DONE
                _require_hope(told, event)
                left = LIVE if deadline is None else min(LIVE, deadline - now())
                if left <= 0:
                    raise StreamError(f"{monitor}: after {limit:g} s: {line(told)}")
                event = await remote.rest(listener, left) or event


async def _look(remote: Remote, event: str | None) -> Status:
    try:
        return await remote.status()
    except GoneError as error:
        raise GoneError(f"{error} before the whole disk was here") from error


def _require_hope(told: Status, event: str | None) -> None:
    """StreamError when nobody is about to bring the rest of the disk here."""
    if told["phase"] == "failed":
        raise StreamError(f"streaming has stopped: {told['error']}; nbd-overlay resume tries again")
    if told["phase"] != "idle" or told["streams-when-activated"]:
        return
    if told["error"]:
        raise StreamError(f"streaming has failed: {told['error']}; nbd-overlay stream tries again")
    if event or told["job"]:
        raise StreamError("streaming was cancelled; nbd-overlay stream goes on")
    raise StreamError("nothing is being streamed: start it with nbd-overlay stream")


class _Show:
    """Shows one status after the other: a live bar on a terminal, else a line now and then."""

    def __init__(self, *, as_json: bool, every: float) -> None:
        self._as_json = as_json
        self._every = every
        self._next = 0.0
        self._bar: Bar | None = None
        self._last: Status | None = None

    def show(self, told: Status) -> None:
        """This is how it goes now."""
        self._last = told
        if self._as_json:
            print(json.dumps(told), flush=True)
        elif sys.stdout.isatty():
            self._show_bar(told)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            print(line(told), flush=True)
            self._last = None

    def _show_bar(self, told: Status) -> None:
        if self._bar is None:
            columns = (BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=Console(), transient=True)
            self._bar.add_task("")
            self._bar.start()
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=told["done"], total=told["total"], description=line(told))

    def __enter__(self) -> _Show:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back, and leave the last that was seen on it."""
        if self._bar is not None:
            self._bar.stop()
        if self._last is not None and not self._as_json:
            print(line(self._last), flush=True)


def _percent(told: Status) -> str:
    # Only what is complete is 100 %.
    share = 100.0 if told["complete"] else min(99.9, 100 * told["done"] / max(1, told["total"]))
    return f"{share:.1f}%"


def _phase(told: Status) -> str:
    if told["complete"]:
        return "complete"
    if told["phase"] == "failed" or told["error"]:
        return f"stopped: {told['error']}"
    return "not streaming" if told["phase"] == "idle" else str(told["phase"])


def _pace(told: Status) -> str:
    if told["rate"] is None:
        return "measuring"
    left = told["seconds-left"]
    return f"{format_size(int(told['rate']))}/s, {'--' if left is None else duration(left)} left"


def _disk(told: Status) -> str:
    absent = told["size"] - told["local"]
    here = f"{_percent(told)} of {format_size(told['size'])} is here"
    return f"{here}, {format_size(absent)} to come" if absent else here


def _job(told: Status) -> str:
    if told["phase"] != "running":
        return _phase(told)
    limit = f"at most {format_size(told['speed'])}/s" if told["speed"] else "no speed limit"
    flight = f"{format_size(told['in-flight'])} in flight, {told['latency'] * 1000:.1f} ms"
    return f"running, {_pace(told)} ({limit}; {flight})"


def _guest(told: Status) -> str:
    if told["armed"]:
        return "not here yet (armed)" + (", streams when it is" if told["streams-when-activated"] else "")
    kept = "" if told["copy-on-read"] else ", copy-on-read off"
    if told["window"] is None:
        return "nothing written yet" + kept
    needed = "needed" if told["complete"] else "has needed"
    return f"here, {needed} the source for {duration(told['window'])}{kept}"


def _needed(told: Status) -> str:
    """What of the source the guest needs still, once it is here."""
    count = told["needed-bytes"]
    if count is None:
        return ""
    if not count:
        return "nothing of the source, which may be switched off"
    left = told["seconds-left"]
    after = "" if left is None else f", for {duration(left)} at this rate"
    return f"the source for {format_size(count)} that are not on stable storage here{after}"


def _copied(told: Status) -> str:
    ahead = f", {format_size(told['fetched-ahead'])} of it ahead" if told["fetched-ahead"] else ""
    return (
        f"{format_size(told['copied'])}: {format_size(told['streamed'])} streamed, "
        f"{format_size(told['fetched'])} for the guest{ahead}"
    )


def _seed(told: Status) -> str:
    if told["seed"] is None:
        return ""
    trouble = f", not used any further: {told['seed-trouble']}" if told["seed-trouble"] else ""
    return f"{told['seed']}: {format_size(told['seeded'])} taken{trouble}"


def _verified(told: Status) -> str:
    if told["verify"] is None:
        return ""
    verify = told["verify"]
    differ = f", {verify['differing']} blocks differ" if verify["differing"] else ""
    over = "" if verify["over"] else ", not over yet"
    equal, written = format_size(verify["compared"]), format_size(verify["written"])
    return f"{equal} equal, {written} the guest's{differ}{over}"


def _misses(told: Status) -> str:
    count = told["misses"]
    return f"{count}, {1000 * told['miss-seconds'] / count:.1f} ms each" if count else "none"


def _channel(told: Status) -> str:
    channel = told["channel"]
    if channel is None:
        return ""
    if channel["done"]:
        return "done: the source was told that it is needed no more"
    ram = f"RAM {channel['ram']}"
    if not channel["connected"]:
        return f"not connected: {channel['trouble']}; {ram}"
    held = f"{format_size(channel['held'])} held of {format_size(channel['bound'])} at most"
    return f"{channel['peer']}, {ram}, {channel['streams']} streams, {held}"


def _mirror(told: Status) -> str:
    mirror = told["mirror"]
    if mirror is None:
        return ""
    trouble = f": {mirror['trouble']}" if mirror["trouble"] else ""
    lag = f"{format_size(mirror['lag'])} and {duration(mirror['lag-seconds'])} behind the guest"
    point = f", point {mirror['point']}" if mirror["point"] else ""
    return f"{mirror['uri']}: {mirror['state']}{trouble}, {lag}{point}"


def _source(source: Mapping[str, Any], complete: bool) -> str:
    if complete:
        return f"{source['uri']}: needed no more"
    errors = f", {source['errors']} errors" if source["errors"] else ""
    if not source["connected"]:
        return f"{source['uri']}: lost: {source['trouble']}{errors}"
    how = f"{source['connections']} connections, {source['latency'] * 1000:.2f} ms"
    if source["quiet"] >= QUIET:
        how += f", no answer for {duration(source['quiet'])}"
    elif source["slow"]:
        how += f", slow: {format_size(int(source['rate']))}/s"
    return f"{source['uri']}: connected, {how}{errors}"
