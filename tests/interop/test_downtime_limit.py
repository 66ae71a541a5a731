"""How long A's QEMU may let its guest stand still: the parameter of a real one, without a guest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdserve.common import clock
from recipes.qemu.source import downtime_limit, set_downtime_limit
from recipes.qemu.vm import connect
from recipes.running.downtime import SHORTEST, Downtime
from tests.support.processes import Process, listens, wait_until

SECONDS = 120.0


def limits(directory: Path, was: int, passes: Sequence[int]) -> list[int]:
    """Follow passes of a QEMU in which ``was`` is set; return the limits it then has, one after the other."""
    monitor = str(directory / "a.qmp")
    argv = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none")

    async def body() -> list[int]:
        a = await connect("A's QEMU", monitor, limit=SECONDS, command_limit=SECONDS)
        try:
            await set_downtime_limit(a, was)
            downtime = Downtime(a, await downtime_limit(a))
            await downtime.begin()
            found = [await downtime_limit(a)]
            for count in passes:
                await downtime.follow(count)
                found.append(await downtime_limit(a))
            return found
        finally:
            await a.disconnect()

    with Process((*argv, "-qmp", f"unix:{monitor},server=on,wait=off"), directory / "a.log"):
        wait_until(lambda: listens(Path(monitor)), "A's monitor")
        return clock.run(body())


def test_it_is_short_at_first_and_grows_to_what_was_set_with_passes_that_do_not_suffice(
    tmp_path: Path,
) -> None:
    assert limits(tmp_path, 300, [0, 1, 2, 3, 4, 9, 12, 13, 14]) == [
        *(SHORTEST, SHORTEST, SHORTEST, SHORTEST),
        *(20, 40, 80, 160, 300, 300),
    ]


def test_a_look_at_the_same_pass_does_not_lengthen_it(tmp_path: Path) -> None:
    assert limits(tmp_path, 300, [3, 3, 3, 0, 3]) == [SHORTEST, 20, 20, 20, 20, 20]


@pytest.mark.parametrize("was", [0, 1, SHORTEST])
def test_one_that_was_shorter_still_stays_as_it_is(tmp_path: Path, was: int) -> None:
    assert limits(tmp_path, was, [1, 5, 9]) == [was] * 4
