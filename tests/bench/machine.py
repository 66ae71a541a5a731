"""Where the measurement ran: without it the numbers mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tests.support.processes import check


def describe_machine(image: Path) -> dict[str, str]:
    """Date, processor, kernel, versions of the tools, and where the image lies."""
    filesystem = check("stat", "--file-system", "--format=%T", str(image.parent)).strip()
    memory = psutil.virtual_memory().total / (1 << 30)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processors": f"{len(os.sched_getaffinity(0))} × {_processor_model()}, {memory:.0f} GiB of memory",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "client": check("fio", "--version").strip() + ", its nbd engine",
        "image": f"{image.stat().st_size >> 20} MiB of random data on {filesystem}, all of it in memory",
    }


def _processor_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class LoadOfOthers:
    """How much of the machine others used: a run with much of that says little."""

    def __init__(self) -> None:
        """Begin to measure."""
        self._before = psutil.cpu_times()

    def share(self, ours: float) -> float:
        """The share of all processors that others took, when ``ours`` seconds of processor time were ours."""
        after = psutil.cpu_times()
        spent = {name: getattr(after, name) - getattr(self._before, name) for name in after._fields}
        # The kernel counts guests' time in user time already.
        total = sum(seconds for name, seconds in spent.items() if not name.startswith("guest"))
        busy = total - spent["idle"] - spent["iowait"]
        return float(max(0.0, (busy - ours) / total)) if total else 0.0
