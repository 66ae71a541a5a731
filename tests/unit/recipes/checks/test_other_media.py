"""What the guest only reads is compared on both hosts: there, as long, and the same inside."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdserve.common import clock
from nbdserve.common.errors import UsageError
from recipes.checks.other_media import check_same, flash_sizes, look
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.flash import PlannedFlash
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.unit.recipes.checks.hosts import ToldVm

MIB = 1 << 20
PLAN = Plan(
    Source(qmp="/run/a.qmp", image="/a.raw"),
    Export(uri="nbd://192.0.2.1/vm"),
    Destination(qemu=("qemu",), image="/b.raw", qmp="/run/b.qmp", migration="unix:/m", same=("/x.iso",)),
)


@dataclass(frozen=True)
class Below(Host):
    """A host whose files are in a directory of this one."""

    root: Path = Path("/")

    async def run(self, *command: str, limit: float, given: str | Awaitable[str] = "") -> str:
        *words, path = command
        return await super().run(*words, f"{self.root}{path}", limit=limit, given=given)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """The directories of A and B."""
    for name in "ab":
        (tmp_path / name).mkdir()
    return tmp_path / "a", tmp_path / "b"


def refused(sides: tuple[Path, Path], plan: Plan = PLAN) -> str:
    """The line that says what is wrong; nothing where nothing is."""
    hosts = (Below("A", root=sides[0]), Below("B", root=sides[1]))
    try:
        clock.run(check_same(plan, *hosts))
    except MigrationError as error:
        return str(error)
    return ""


def test_a_plan_that_names_none_needs_none(sides: tuple[Path, Path]) -> None:
    there = dataclasses.replace(PLAN.destination, same=())
    assert refused(sides, dataclasses.replace(PLAN, destination=there)) == ""


@pytest.mark.parametrize("size", [0, 1, MIB + 1, 200 * MIB])
def test_the_same_file_is_found_and_another_one_refused(sides: tuple[Path, Path], size: int) -> None:
    a, b = (side / "x.iso" for side in sides)
    assert refused(sides) == "destination.same: there is no file /x.iso on A"
    with a.open("wb") as file:
        file.truncate(size)
    assert refused(sides).startswith(
        "destination.same: /x.iso, which the guest reads, is not on B: copy it there"
    )
    with b.open("wb") as file:
        file.truncate(size)
    assert refused(sides) == ""
    with b.open("r+b") as file:
        file.seek(size)
        file.write(b"x")
    assert f"/x.iso is not on B as it is on A ({size + 1} bytes, " in refused(sides)
    for at in (0, size - 1) if size else ():
        with b.open("r+b") as file:
            file.truncate(0)
            file.truncate(size)
            file.seek(at)
            file.write(b"x")
        assert "/x.iso is not on B as it is on A (" in refused(sides)


@pytest.mark.parametrize("size", [5, 65 * MIB])
def test_what_cannot_be_read_is_not_taken_for_the_same_on_both_hosts(size: int) -> None:
    # Who runs commands there can enter the directory.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        file = Path(directory, "x.iso")
        file.write_bytes(bytes(size))
        file.chmod(0)
        somebody = ("setpriv", "--reuid=65534", "--clear-groups") if os.geteuid() == 0 else ()
        with pytest.raises(MigrationError, match="Permission denied"):
            clock.run(look(Host("A", somebody), str(file), 20.0))


def test_a_flash_chip_is_known_by_the_name_that_qemu_has_for_its_file() -> None:
    inserted = {"file": "vars.fd", "image": {"virtual-size": 65536}}
    a = ToldVm({"query-block": [{"device": "pflash1", "inserted": inserted}, {"device": "cd"}]})
    plan = dataclasses.replace(PLAN, flash=(PlannedFlash("/home/vm/vars.fd", "/b/vars.fd"),))
    assert clock.run(flash_sizes(plan, a)) == [65536]
    assert clock.run(flash_sizes(PLAN, a)) == []
    plan = dataclasses.replace(PLAN, flash=(PlannedFlash("/home/vm/other.fd", "/b/vars.fd"),))
    with pytest.raises(UsageError, match=r"flash.image: /home/vm/other.fd is in no drive of A's QEMU"):
        clock.run(flash_sizes(plan, a))
    with pytest.raises(UsageError, match=r"flash.target: /b.raw.map is that of something else of this plan"):
        dataclasses.replace(PLAN, flash=(PlannedFlash("/x", "/b.raw.map"),))
