"""The six shell recipes, run one after another as an operator would, on a real Linux guest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from recipes.demo import run as demo
from recipes.demo.stage import Stage
from recipes.demo.verdict import Phases, Verdict
from tests.support.guests import MIB, guest_running, staged
from tests.support.processes import Process, is_alive, wait_until
from tests.support.recipes import Operator, operator_of


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path, 64 * MIB, "qemu") as stage:
        yield stage


@pytest.fixture
def source(stage: Stage) -> Iterator[Process]:
    """The guest on A, writing."""
    with guest_running(stage) as machine:
        yield machine


@pytest.fixture
def operator(stage: Stage, source: Process) -> Iterator[Operator]:
    """The operator; the daemons that the recipes have left running end with the test."""
    operator = operator_of(stage)
    yield operator
    for name in ("NBD_PID_FILE", "FENCE_FILE", "DESTINATION_PID_FILE"):
        end(Path(operator.variables[name]))


def end(pid_file: Path) -> None:
    """Kill the process of a pid file, and wait until it is gone."""
    if pid_file.exists():
        pid = int(pid_file.read_text())
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), f"process {pid} to end")


@contextmanager
def suspended(pid_file: Path) -> Iterator[None]:
    """A process that is silent for a while, as on a machine that swaps."""
    process = psutil.Process(int(pid_file.read_text()))
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def judge(stage: Stage, phases: tuple[int, int, int]) -> Verdict:
    """Let the guest write on B, verify and end, and judge what it and the host find."""
    guest = stage.guest_on_b
    asyncio.run(demo.write_for(0.5, guest))
    memory = asyncio.run(guest.verify())
    leftovers = tuple(stage.leftovers())
    asyncio.run(guest.stop())
    return demo.judge(stage, demo.Evidence(memory, Phases(*phases, memory.written), leftovers))


def test_the_six_recipes_migrate_a_guest_and_its_disk(
    stage: Stage, operator: Operator, source: Process
) -> None:
    operator.must(1)
    operator.must(2)
    operator.must(3, *stage.guest_on_b.qemu)
    # Run again, they do not touch what the first run has left.
    with suspended(Path(operator.variables["DESTINATION_PID_FILE"])):
        assert "a QEMU listens at" in operator.fails(3, *stage.guest_on_b.qemu)
    fence = Path(operator.variables["FENCE_FILE"])
    fence.write_text(f"{source.pid}\n")
    assert f"process {source.pid} of {fence} runs; is that a fence of another" in operator.fails(4)
    assert operator.qmp("a", "query-status", "--get", "status").stdout == "running\n"
    fence.write_text(f"{dead_process()}\n")
    before = stage.guest_on_a.announced
    assert "the guest runs on B; it stood still for" in operator.must(4)
    assert "a QEMU listens at" in operator.fails(3, *stage.guest_on_b.qemu)
    cut_over = stage.guest_on_a.announced
    # From now on the fence keeps the guest from running on A's stale disk.
    refused = operator.qmp("a", "cont")
    assert (refused.returncode, "lock" in refused.stderr) == (1, True), refused
    assert operator.qmp("a", "query-status", "--get", "status").stdout == "postmigrate\n"
    assert "every block is local" in operator.must(5, SPEED=str(16 * MIB))
    streamed = stage.guest_on_b.announced
    assert f"{stage.image} is now {stage.moved}" in operator.must(6)
    assert source.wait() == 0
    verdict = judge(stage, (before, cut_over, streamed))
    assert verdict.holds, list(verdict.lines())


def test_a_server_that_dies_while_the_disk_is_streamed_costs_time_but_no_data(
    stage: Stage, operator: Operator, tmp_path: Path
) -> None:
    operator.must(1)
    operator.must(2)
    operator.must(3, *stage.guest_on_b.qemu, RECONNECT_DELAY="1")
    before = stage.guest_on_a.announced
    operator.must(4)
    cut_over = stage.guest_on_a.announced
    assert "B still uses the export: run step 5 to its end; nothing was ended" in operator.fails(6)
    with operator.start(5, tmp_path / "stream.log", SPEED=str(MIB), STALL_TIMEOUT="4") as streaming:
        streaming.wait_for_line("job running", seconds=30)
        end(Path(operator.variables["NBD_PID_FILE"]))
        assert streaming.wait(60) == 1
        assert "no progress for 4 s; see to the server of step 1" in streaming.output()
    operator.must(1)
    assert operator.qmp("b", "block-job-set-speed", '{"device": "stream", "speed": 0}').returncode == 0
    assert "every block is local" in operator.must(5)
    streamed = stage.guest_on_b.announced
    operator.must(6)
    verdict = judge(stage, (before, cut_over, streamed))
    assert verdict.holds, list(verdict.lines())


def test_a_destination_that_fails_leaves_the_guest_running_on_a(
    stage: Stage, operator: Operator, tmp_path: Path
) -> None:
    operator.must(1)
    operator.must(2)
    # It takes the RAM, but not the state of the second serial port, as it has none.
    qemu = list(stage.guest_on_b.qemu)
    port = qemu.index("chardev:control")
    operator.must(3, *qemu[: port - 1], *qemu[port + 1 :])
    said = operator.fails(4)
    assert "the guest runs on here, on A, as the migration failed" in said
    # QEMU 7.2 gives no reason for an end of its return path.
    assert "query-migrate: status is failed" in said or "Sibling indicated error" in said
    assert "load of migration failed" in operator.log_of_b()
    asyncio.run(demo.write_for(0, stage.guest_on_a))

    # It is killed while the RAM moves.
    end(Path(operator.variables["DESTINATION_PID_FILE"]))
    operator.must(3, *qemu)
    assert operator.qmp("a", "migrate-set-parameters", '{"max-bandwidth": 4000000}').returncode == 0
    with operator.start(4, tmp_path / "migrate.log") as migrating:
        migrating.wait_for(lambda: ram_moves(operator), "the RAM to move", seconds=30)
        end(Path(operator.variables["DESTINATION_PID_FILE"]))
        assert migrating.wait(60) == 1
        assert "the guest runs on here, on A, as the migration failed" in migrating.output()
    asyncio.run(demo.write_for(0, stage.guest_on_a))
    assert asyncio.run(stage.guest_on_a.verify()).bad == 0


def dead_process() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait(10.0)
    return ended.pid


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_an_interrupted_recipe_gives_the_guest_back(
    stage: Stage, operator: Operator, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    """As by Ctrl-C, which all of the terminal's processes get, or by a kill of the recipe alone."""
    operator.must(1)
    operator.must(2)
    operator.must(3, *stage.guest_on_b.qemu)
    assert operator.qmp("a", "migrate-set-parameters", '{"max-bandwidth": 1000000}').returncode == 0
    with operator.start(4, tmp_path / "migrate.log") as migrating:
        migrating.wait_for(lambda: ram_moves(operator), "the RAM to move", seconds=30)
        if group:
            os.killpg(migrating.pid, number)
        else:
            migrating.signal(number)
        assert migrating.wait(30) == 1
        assert "the guest runs on here, on A, as the migration failed: interrupted" in migrating.output()
    asyncio.run(demo.write_for(0, stage.guest_on_a))


def ram_moves(operator: Operator) -> bool:
    """Whether A is sending the guest's RAM now."""
    return operator.qmp("a", "query-migrate", "--get", "status").stdout == "active\n"
