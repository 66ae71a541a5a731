"""Step 4 of five: what keeps the guest on A, and what keeps it from running there again."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.channels import Road
from tests.support.pasting import COMMANDS
from tests.support.processes import Process, check, is_alive, run, wait_until
from tests.support.vms import Scene, monitor
from tests.vm.test_recipes_channel import (
    ROOT,
    STEPS,
    Operator,
    arrived,
    complete,
    goes_again,
    is_alive_by,
    slow_down,
    small,  # noqa: F401 - a fixture
)

SOON = 7.0
"""Seconds, fewer than the ten that a greeting may take."""


def migrating(guest: Scene, operator: Operator, **changes: str) -> Process:
    """Step 4, in a session of its own, as a terminal's."""
    line = ["setsid", "bash", "-c", STEPS[3]]
    return Process(line, guest.directory / "4.log", env=operator.environment(changes), cwd=ROOT)


@pytest.mark.representative
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_migration_that_is_interrupted_leaves_the_guest_at_a_and_may_be_begun_again(
    small: tuple[Scene, Operator, Road],  # noqa: F811
    number: signal.Signals,
) -> None:
    guest, operator, _ = small
    for step in (1, 2, 3):
        operator.must(step)
    slow_down(guest)
    with migrating(guest, operator) as step_4:
        wait_until(lambda: "RAM under-way" in operator.status(), "RAM moves")
        os.killpg(step_4.pid, number)
        assert step_4.wait(60.0) == 1
        said = step_4.output()
    assert "the guest runs on here, on A, as the migration failed: interrupted" in said
    guest.wait_until_guest_works("a")
    wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")
    wait_until(lambda: not is_alive_by(Path(f"{guest.monitor_b}.pid")), "B's QEMU has ended")
    goes_again(guest, operator)


def test_a_migration_is_cancelled_while_its_end_still_connects(
    small: tuple[Scene, Operator, Road],  # noqa: F811
) -> None:
    guest, operator, _ = small
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        with migrating(guest, operator, CONNECT=place) as step_4:
            wait_until(lambda: operator.ends_at_a() != [], "A's end is there")
            with monitor(guest.monitor_a) as a:
                wait_until(lambda: a.execute("query-migrate").get("status") == "active", "it is under way")
                began = time.monotonic()
                a.execute("migrate_cancel")
                wait_until(lambda: a.execute("query-migrate")["status"] == "cancelled", "it is cancelled")
                assert time.monotonic() - began < SOON
            assert step_4.wait(60.0) == 1
            assert "the guest runs on here, on A, as the migration failed: " in step_4.output()
    guest.wait_until_guest_works("a")
    wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")


def test_a_name_that_a_does_not_serve_keeps_the_guest_at_a(
    small: tuple[Scene, Operator, Road],  # noqa: F811
) -> None:
    guest, operator, _ = small
    for step in (1, 2, 3):
        operator.must(step)
    assert "the guest would be without its disk: " in operator.fails(4, NAME="another")
    guest.wait_until_guest_works("a")


@pytest.mark.representative
def test_nothing_on_a_writes_to_the_disk_while_b_needs_it_and_then_anybody_may(
    small: tuple[Scene, Operator, Road],  # noqa: F811
) -> None:
    guest, operator, _ = small
    arrived(guest, operator)

    def write() -> str:
        return run("qemu-io", "-f", "raw", "-c", "info", guest.image).stderr

    wait_until(lambda: "lock" in write(), "the fence stands")
    complete(guest, operator)
    assert write() == ""


def test_a_disk_that_is_whole_needs_nobody_at_a_any_more(
    small: tuple[Scene, Operator, Road],  # noqa: F811
) -> None:
    guest, operator, _ = small
    arrived(guest, operator)
    control = f"unix:{operator.variables['OVERLAY']}.qmp"
    for word in ("stream", "wait"):
        check(COMMANDS / "nbd-overlay", word, "--qmp", control)
    wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")
    killed = operator.overlay()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not is_alive(killed), "nbd-overlay is dead")
    operator.must(2)
    done = operator.type(5)
    assert done.returncode == 0, done.stderr
    assert "every block is here, and this goes on without A" in done.stderr
    guest.quit_b()
    assert guest.wrong_sectors() == []
