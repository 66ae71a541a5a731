"""One run of fio's nbd engine, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.bench.rows import ClientRun, Row
from tests.support.processes import check


def run_fio(uri: str, row: Row, seconds: float, before: Sequence[str] = ()) -> ClientRun:
    """Run the row's job against an export for so many seconds; ``before`` stands before the command."""
    output = check(
        *before,
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={row.access}",
        f"--bs={row.block}",
        f"--iodepth={row.depth}",
        f"--numjobs={row.connections}",
        "--norandommap",
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
        "--output-format=json",
        seconds=seconds + 60,
        # Where anybody may be.
        cwd=Path("/"),
    )
    # libnbd's warnings may stand before the report.
    jobs = json.loads(output[output.index("{") :])["jobs"]
    parts = [job["write" if row.writes else "read"] for job in jobs]
    busy = [(job["usr_cpu"] + job["sys_cpu"]) / 100 for job in jobs]
    durations = [job["job_runtime"] / 1000 for job in jobs]
    return ClientRun(
        operations=sum(part["total_ios"] for part in parts),
        bytes=sum(part["io_bytes"] for part in parts),
        seconds=max(durations),
        processor=max(busy),
        processor_seconds=sum(share * length for share, length in zip(busy, durations, strict=True)),
    )
