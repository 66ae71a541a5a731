"""The disk before the guest, as libvirt's copy-storage does it: a mirror to B's QEMU, which serves its disk.

B's QEMU takes the disk by NBD while the guest runs on A; when the mirror is ready, the RAM follows, and what
the guest writes goes to both until it stands still. Then nothing on A is needed any more.

A mirror becomes ready in an instant in which nothing is to be written and nothing is on its way (seen with
QEMU 7.2). With a guest that writes more often than B answers there may be none; with
``copy-mode=write-blocking`` (libvirt's ``--copy-storage-synchronous-writes``) the guest waits for B instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.bench.migrate.guest import NODE
from tests.bench.migrate.hosts import ADDRESSES, TARGET_PORT
from tests.bench.migrate.setting import (
    Moved,
    Setting,
    arrived,
    job,
    monitor,
    raw_on,
    reach,
    switch_on,
)

TARGET, JOB = "target", "mirror"

PATIENCE, SLOW = 60.0, 10e6
"""Seconds, and bytes per second of the disk, in which a mirror must be ready."""


def moves(copy_mode: str) -> Callable[[Setting], Moved]:
    """Return what moves a guest with a mirror in this mode."""
    return lambda setting: asyncio.run(_move(setting, copy_mode))


async def _move(setting: Setting, copy_mode: str) -> Moved:
    began, target = time.monotonic(), setting.target("raw")
    with target.open("wb") as file:
        file.truncate(setting.size)
    setting.qemu("b", raw_on(target), "-incoming", "defer")
    place = {"host": ADDRESSES["b"], "port": str(TARGET_PORT)}
    remote = {"driver": "nbd", "server": {"type": "inet", **place}, "export": NODE}
    async with monitor(setting, "a") as a, monitor(setting, "b") as b:
        await switch_on(b, "events", "return-path")
        await b.execute("nbd-server-start", addr={"type": "inet", "data": place})
        await b.execute("block-export-add", type="nbd", id="target", node_name=NODE, writable=True)
        await b.execute("migrate-incoming", uri=setting.ram)
        await a.execute("blockdev-add", node_name=TARGET, driver="raw", file=remote)
        with a.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") as news:
            given = {"job-id": JOB, "device": NODE, "target": TARGET, "sync": "full", "copy-mode": copy_mode}
            await a.call("blockdev-mirror", given)
            await job(a, news, "BLOCK_JOB_READY", PATIENCE + setting.size / SLOW)
            await switch_on(a, "events", "return-path", "pause-before-switchover")
            with a.events("MIGRATION") as steps:
                await a.execute("migrate", uri=setting.ram)
                await reach(a, steps, "pre-switchover")
                # Of a mirror that is ready this is its good end.
                await a.execute("block-job-cancel", device=JOB)
                await job(a, news, "BLOCK_JOB_COMPLETED")
                await a.execute("blockdev-del", node_name=TARGET)
                await b.execute("nbd-server-stop")
                await a.execute("migrate-continue", state="pre-switchover")
                await reach(a, steps, "completed")
        downtime = (await a.execute("query-migrate"))["downtime"]
        await arrived(setting, b)
        free = time.monotonic()
        await a.execute("quit")
        await a.gone()
    return Moved(began, free, time.monotonic(), downtime, "raw", window=False)
