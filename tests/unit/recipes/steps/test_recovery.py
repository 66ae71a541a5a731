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
    m.place = lambda *_: asyncio.sleep(0, "/log")
    recovery = Recovery(cast(Any, m), cast(Any, SimpleNamespace()))
    job = SimpleNamespace(disk=disk, bytes_missing=65536)
    with pytest.raises(MigrationError) as raised:
        asyncio.run(recovery._refuse_failed_job(cast(Any, job), error))
    assert told in str(raised.value)
    assert ("65536 bytes of the disk are still to come" in str(raised.value)) == ("no space" in told)
