"""What an operator reads where a stream cannot go on."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.plans.limits import Limits
from recipes.steps.recovery import Recovery


def on_a(disk: SimpleNamespace) -> SimpleNamespace:
    """What is known of a disk whose image is where it was."""
    return SimpleNamespace(on_a=disk.image)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (os.strerror(errno.ENOSPC), "there is no space left for /b.raw on B"),
        (os.strerror(errno.EDQUOT), "there is no space left for /b.raw on B"),
        (os.strerror(errno.EIO), "mend B's disk"),
        ("the backing at 65536 cannot be read: I/O error", "/a.raw on A: the backing at 65536"),
    ],
)
def test_a_disk_of_b_that_is_full_is_not_taken_for_a_broken_one(error: str, told: str) -> None:
    """Also where the stream was told to go on a moment ago, and QEMU's word for it is gone."""
    disk = SimpleNamespace(image="/a.raw", target="/b.raw")
    m = SimpleNamespace(plan=SimpleNamespace(limits=Limits()), b=None, disks=[disk], pending=[disk])
    m.finish, m.host_a, m.host_b = "nbd-migrate resume vm", SimpleNamespace(), SimpleNamespace()
    m.state = SimpleNamespace(disk=on_a)
    m.place = lambda *_: asyncio.sleep(0, "/log")
    recovery = Recovery(cast(Any, m), cast(Any, SimpleNamespace()))
    job = SimpleNamespace(disk=disk, bytes_missing=65536)
    with pytest.raises(MigrationError) as raised:
        asyncio.run(recovery._refuse_failed_job(cast(Any, job), error))
    assert told in str(raised.value)
    assert ("65536 bytes of the disk are still to come" in str(raised.value)) == ("no space" in told)


@pytest.mark.parametrize("old", [True, False])
def test_a_difference_that_is_found_while_the_stream_comes_back_is_not_compared_away(
    monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Nobody has asked for that; by then the guest may have written over it."""
    told: list[str] = []
    verify = {"differing": 0, "first": None}
    job = SimpleNamespace(disk=SimpleNamespace(image="/a.raw", target="/b.raw"), vm=object(), name="stream")
    phase = "failed" if old else "running"

    async def execute(vm: object, command: str, given: object = None) -> Any:
        nonlocal phase
        told.append(command)
        if command == "block-job-resume":
            phase = "running"
        return {"phase": phase, "error": "1 block differs", "verify": verify, "sources": []}

    async def waiting() -> list[SimpleNamespace]:
        """The job comes to the end of its comparison as soon as it goes on."""
        nonlocal phase
        found = [job] if phase == "failed" else []
        if phase == "running":
            phase = "failed"
            verify.update(differing=1, first=65536)
        return found

    m = SimpleNamespace(plan=SimpleNamespace(limits=Limits(recover=5.0)), b=None, disks=[job.disk])
    m.state, m.record = SimpleNamespace(recoveries=0, disk=on_a), lambda **_: None
    m.finish = "nbd-migrate resume vm"
    m.report = SimpleNamespace(note=lambda _: None)
    m.server, m.child, m.host_a = None, lambda _: None, None
    m.place = lambda *_: asyncio.sleep(0, "/log")
    jobs = SimpleNamespace(running=[job], all=[job], execute=execute, waiting=waiting)
    recovery = Recovery(cast(Any, m), cast(Any, jobs))
    for name in ("_refuse_full", "bring_export_back"):
        monkeypatch.setattr(recovery, name, lambda: asyncio.sleep(0))
    monkeypatch.setattr(recovery, "refuse_lost_source", lambda **_: asyncio.sleep(0))
    monkeypatch.setattr(recovery, "_size_of_log", lambda: asyncio.sleep(0, 0))
    monkeypatch.setattr(recovery, "_new_in_log", lambda _: asyncio.sleep(0, ""))
    with pytest.raises(MigrationError, match=r"/b\.raw on B, compared with /a\.raw on A: 1 block differs"):
        asyncio.run(recovery.recover("the server has ended", old=old))
    assert told.count("block-job-resume") == old
