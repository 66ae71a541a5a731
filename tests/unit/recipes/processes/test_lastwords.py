"""What is told of a process's log when it has ended."""

from __future__ import annotations

import pytest

from recipes.processes.lastwords import last_words

QEMU = "qemu-system-x86_64: "


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], ""),
        (["", "  "], ""),
        (["starting", "the port is taken", ""], "the port is taken"),
        (
            [
                f"{QEMU}warning: of something else",
                "a line of the guest's",
                f"{QEMU}Size mismatch: pc.ram: 0x2000000 != 0x4000000: Invalid argument",
                f"{QEMU}error while loading state for instance 0x0 of device 'ram'",
                f"{QEMU}load of migration failed: Invalid argument",
            ],
            f"{QEMU}load of migration failed: Invalid argument: error while loading state for instance 0x0 "
            "of device 'ram': Size mismatch: pc.ram: 0x2000000 != 0x4000000: Invalid argument",
        ),
        (
            [f"{QEMU}load of migration failed: Input/output error"],
            f"{QEMU}load of migration failed: Input/output error",
        ),
    ],
)
def test_the_last_line_says_why_and_of_a_failed_load_those_before_it(lines: list[str], told: str) -> None:
    assert last_words("\n".join(lines)) == told
