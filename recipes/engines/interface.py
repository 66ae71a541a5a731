"""What the steps ask of whoever has the guest's disk on B."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar

from nbdserve.common.errors import ConnectError
from recipes.connections.monitors import MonitorAt
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.qemu.vm import Vm, connect

JOB = "stream"
"""The block job's name; of several on one monitor the beginning of it."""

LOOK = 0.05
"""Seconds between two looks at what no event announces."""


class Engine(ABC):
    """What is different between the two in steps 1, 2, 3, 5 and 6; each question is about one of the disks.

    layout              of the image that step 2 makes
    structured_replies  whether the export may offer them
    """

    layout: str
    structured_replies: ClassVar[bool]
    read_by_qemu: ClassVar[bool] = False
    """Whether it is B's QEMU that connects to the export."""

    @abstractmethod
    def files(self, disk: PlannedDisk) -> list[str]:
        """Return what the migration makes on B, and what of it a failure before the cut-over has to
        remove.
        """

    @abstractmethod
    def nodes(self, plan: Plan, disk: PlannedDisk) -> list[dict[str, object]]:
        """Return the disk in B's QEMU, as -blockdev options.

        The last one is what the -device refers to.
        """

    @abstractmethod
    def needed_later(self, plan: Plan, disk: PlannedDisk) -> dict[str, dict[str, object]]:
        """Return what B's QEMU has to do again, or for the first time, while the guest is there.

        They are -blockdev options, by what they are called.
        """

    @abstractmethod
    def complete_node(self, disk: PlannedDisk, size: int) -> dict[str, object]:
        """Return the disk, of ``size`` bytes, in B's QEMU once it is all local, as a -blockdev option."""

    @abstractmethod
    def streamed(self, plan: Plan, disk: PlannedDisk) -> tuple[str, str]:
        """Return the name of the disk's block job, and the device that block-stream is told."""

    @abstractmethod
    async def prepare(self, m: Migration, disk: PlannedDisk) -> None:
        """Step 3, before B's QEMU is started."""

    @abstractmethod
    async def prepare_again(self, m: Migration, disk: PlannedDisk) -> None:
        """Before a QEMU is started on B on an incomplete disk whose guest has been here."""

    @abstractmethod
    async def monitor(self, m: Migration, disk: PlannedDisk) -> Vm:
        """Step 5: the monitor that streaming is told to."""

    @abstractmethod
    async def confirm(self, m: Migration, disk: PlannedDisk) -> None:
        """Step 5, when the job has ended well: see that the image says so too."""

    async def account(self, m: Migration, disk: PlannedDisk) -> float:
        """Write down how a disk has become complete, as far as who has copied it can tell; return for how
        many seconds it was compared with A when all of it was there.
        """
        return 0.0

    @abstractmethod
    async def carries(self, m: Migration, disk: PlannedDisk) -> bool:
        """Tell whether a guest uses a process of ours for a disk of which every block is local already."""

    @abstractmethod
    async def detach(self, m: Migration, disk: PlannedDisk) -> None:
        """Step 6: every block is local; part B's QEMU from all that is not its own file."""

    @abstractmethod
    async def end(self, m: Migration, disk: PlannedDisk) -> None:
        """Step 6: end what nobody uses any more."""


async def reached(name: str, where: MonitorAt, plan: Plan) -> Vm:
    """Connect to a monitor as soon as it is there; the time limit is the caller's."""
    limits = plan.limits
    while True:
        with suppress(ConnectError):
            return await connect(name, where, limit=limits.connect, command_limit=limits.command)
        await asyncio.sleep(LOOK)


def blockdev_options(nodes: Sequence[Mapping[str, object]]) -> list[str]:
    """Block nodes as words of QEMU's command line."""
    return [word for node in nodes for word in ("-blockdev", json.dumps(node))]
