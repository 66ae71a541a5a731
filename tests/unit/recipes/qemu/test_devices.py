"""What has come to A's QEMU, or gone from it, while its guest was on its way."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.qemu.devices import check_jobs, devices_of, difference
from recipes.qemu.vm import Vm


class Answering:
    """A QEMU that gives these answers."""

    name = "A's QEMU"

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    async def execute(self, command: str, path: str = "") -> Any:
        """Answer as QEMU does."""
        return self._answers[path.rpartition("/")[2].replace("-", "_") or command.replace("-", "_")]


def test_devices_are_known_by_name_and_kind() -> None:
    named = [{"name": "type", "type": "string"}, {"name": "net0", "type": "child<virtio-net-pci>"}]
    other = [{"name": "device[0]", "type": "child<virtio-rng-pci>"}]
    a = cast(Vm, Answering(peripheral=named, peripheral_anon=other))
    assert asyncio.run(devices_of(a)) == ("device[0] (virtio-rng-pci)", "net0 (virtio-net-pci)")


def test_what_has_come_and_gone_is_told() -> None:
    assert difference(("a (x)", "b (y)"), ("b (y)", "a (x)")) == ""
    assert difference(("a (x)",), ("a (y)", "b (z)")) == "a (y), b (z) has come and a (x) has gone"


@pytest.mark.parametrize("status", ["running", "ready", "paused", "concluded", "null"])
def test_a_job_that_is_at_work_is_refused(status: str) -> None:
    a = cast(Vm, Answering(query_jobs=[{"id": "copy", "type": "mirror", "status": status}]))
    if status in ("concluded", "null"):
        asyncio.run(check_jobs(a))
        return
    with pytest.raises(MigrationError, match=r"^a job is at work in A's QEMU: copy \(mirror\); wait until"):
        asyncio.run(check_jobs(a))
