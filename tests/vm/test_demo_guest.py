"""The demo's guest in one QEMU: it notices every record that is not what it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.demo import disk, records
from recipes.demo.guest import Guest, Memory
from recipes.demo.records import Place
from recipes.demo.stage import Stage
from recipes.errors import MigrationError
from tests.support.guests import MIB, flip, guest_running, staged
from tests.support.processes import Process

ZEROES = 128  # sectors of the records that are all zeroes


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("demo-guest"), 128 * MIB) as stage:
        yield stage


@pytest.fixture(scope="module")
def guest(stage: Stage) -> Iterator[Guest]:
    """A guest that the tests of this module share: each leaves it paused, with a sound disk."""
    with guest_running(stage):
        yield stage.guest_on_a


def write_until(guest: Guest, number: int) -> int:
    """Let the guest write up to a record, and pause; return the last one."""
    asyncio.run(guest.command("resume"))
    asyncio.run(guest.reach(number, 60))
    return int(asyncio.run(guest.command("pause"))[0])


def content(image: Path, place: Place) -> bytes:
    with image.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


def put(image: Path, place: Place, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(place.offset)
        file.write(data)


def verify(guest: Guest) -> Memory:
    return asyncio.run(guest.verify())


def data_record(cells: int, numbers: range) -> tuple[int, Place]:
    """A record that is not all zeroes, and its place."""
    for number in numbers:
        place = records.place(number, cells)
        if place.count != ZEROES:
            return number, place
    raise AssertionError("there is none")


def test_a_changed_byte_is_named_with_its_record(stage: Stage, guest: Guest) -> None:
    write_until(guest, 100)
    number, place = data_record(stage.cells, range(51, 56))
    flip(stage.image, place.offset + place.length - 2)
    memory = verify(guest)
    flip(stage.image, place.offset + place.length - 2)
    assert memory.bad == 1
    assert f"record {number} at sector {place.first} " in memory.complaint
    assert verify(guest).bad == 0


def test_a_changed_byte_in_a_record_of_zeroes_is_found(stage: Stage, guest: Guest) -> None:
    write_until(guest, 100)
    place = next(p for p in map(records.place, range(1, 80), [stage.cells] * 79) if p.count == ZEROES)
    flip(stage.image, place.offset + 40000)
    memory = verify(guest)
    flip(stage.image, place.offset + 40000)
    assert memory.bad == 1


def test_a_write_that_was_undone_is_found_although_the_older_record_is_sound(
    stage: Stage, guest: Guest
) -> None:
    older, place = data_record(stage.cells, range(204, 244, 8))
    assert write_until(guest, older) < 2 * older
    before = content(stage.image, place)
    assert records.place(2 * older, stage.cells) == place
    write_until(guest, 2 * older)
    after = content(stage.image, place)
    put(stage.image, place, before)
    memory = verify(guest)
    put(stage.image, place, after)
    assert memory.bad == 1
    assert f"record {2 * older} at sector {place.first} " in memory.complaint
    assert f"now begins with 'record {older} sector {place.first} " in memory.complaint


@pytest.mark.representative
def test_the_guest_finds_its_records_and_the_host_the_rest_of_the_disk(stage: Stage, guest: Guest) -> None:
    """The last one to use the shared guest: the disk can only be compared when it is switched off."""
    write_until(guest, 100)
    memory = verify(guest)
    asyncio.run(guest.stop())
    assert (memory.bad, memory.complaint) == (0, "")
    assert memory.written >= 100
    assert memory.live == len(records.newest(memory.written, stage.cells))
    extents = list(records.extents(memory.written, stage.cells))
    assert disk.compare(stage.original, stage.image, "raw", extents).equal
    # Without exceptions the host sees what the guest wrote, so it does look at those places otherwise.
    assert disk.compare(stage.original, stage.image, "raw", []).different >= len(extents) // 2


def test_no_wait_for_the_guest_is_without_end(tmp_path: Path) -> None:
    async def kill_while_waiting(guest: Guest, machine: Process) -> None:
        waiting = asyncio.create_task(guest.reach(10**6, 60))
        await asyncio.sleep(0.5)
        machine.kill()
        async with asyncio.timeout(60):
            with pytest.raises(MigrationError, match="its QEMU has ended"):
                await waiting

    with staged(tmp_path, 4 * MIB) as stage, guest_running(stage) as machine:
        guest = stage.guest_on_a
        with pytest.raises(MigrationError, match=r"waited 0\.001 s in vain for the guest to answer 'verify'"):
            asyncio.run(guest.command("verify", seconds=0.001))
        asyncio.run(kill_while_waiting(guest, machine))
        with pytest.raises(MigrationError, match="waited for the guest to answer 'status', but"):
            asyncio.run(guest.command("status"))
