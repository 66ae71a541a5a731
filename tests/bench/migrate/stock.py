"""The six steps with nothing but QEMU: qemu-nbd, a QED overlay with copy-on-read, QEMU's own streaming."""

from __future__ import annotations

import asyncio
import time

from tests.bench.migrate.guest import NODE
from tests.bench.migrate.hosts import ADDRESSES, DISK_PORT
from tests.bench.migrate.setting import (
    Moved,
    Setting,
    arrived,
    job,
    monitor,
    reach,
    switch_on,
)
from tests.support.processes import check
from tests.support.servers import fresh_path


def move(setting: Setting) -> Moved:
    """Move the guest."""
    return asyncio.run(_move(setting))


async def _move(setting: Setting) -> Moved:
    began, target = time.monotonic(), setting.target("qed")
    pid_file = fresh_path(setting.guest.sockets, "qemu-nbd", ".pid")
    served = ("-b", ADDRESSES["a"], "-p", DISK_PORT, "-x", "disk", "--pid-file", pid_file)
    server = setting.start("a", "qemu-nbd", "-r", "-t", "-f", "raw", *served, setting.image)
    server.wait_for_pid_file(pid_file)
    backing = f"nbd://{ADDRESSES['a']}:{DISK_PORT}/disk"
    check(*setting.hosts.on("b", "qemu-img", "create", "-q", "-f", "qed", "-F", "raw", "-b", backing, target))
    setting.qemu("b", nodes(setting), "-incoming", "defer")
    async with monitor(setting, "a") as a, monitor(setting, "b") as b:
        await switch_on(b, "events", "return-path")
        await b.execute("migrate-incoming", uri=setting.ram)
        await switch_on(a, "events", "return-path")
        with a.events("MIGRATION") as news:
            await a.execute("migrate", uri=setting.ram)
            await reach(a, news, "completed")
        with b.events("BLOCK_JOB_COMPLETED") as news:
            await b.execute("block-stream", job_id="stream", device=f"{NODE}-overlay")
            downtime = (await a.execute("query-migrate"))["downtime"]
            await job(b, news, "BLOCK_JOB_COMPLETED")
        # As ours: a power failure on B must not bring A back into it.
        check(*setting.hosts.on("b", "sync", target), seconds=600)
        free = time.monotonic()
        await arrived(setting, b)
        await a.execute("quit")
        await a.gone()
    server.terminate()
    return Moved(began, free, time.monotonic(), downtime, "qed")


def nodes(setting: Setting) -> list[dict[str, object]]:
    """Return those of B's QEMU: copy-on-read over the overlay over the export."""
    server = {"type": "inet", "host": ADDRESSES["a"], "port": str(DISK_PORT)}
    export = {"driver": "nbd", "server": server, "export": "disk"}
    return [
        {"node-name": f"{NODE}-backing", "driver": "raw", "read-only": True, "file": export},
        {
            "node-name": f"{NODE}-overlay",
            "driver": "qed",
            "file": {"driver": "file", "filename": str(setting.target("qed"))},
            "backing": f"{NODE}-backing",
        },
        {"node-name": NODE, "driver": "copy-on-read", "file": f"{NODE}-overlay"},
    ]
