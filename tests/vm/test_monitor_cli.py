"""``nbd-migrate qmp`` on a real QEMU's monitor."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.guests import short_directory
from tests.support.processes import Process, listens, run

NBD_MIGRATE = Path(sys.executable).with_name("nbd-migrate")
MACHINE = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-accel", "tcg")
DISKS = (
    *("-blockdev", "driver=null-co,node-name=zero,size=1048576"),
    *("-blockdev", "driver=null-co,node-name=one,size=2097152,read-only=on"),
)


@pytest.fixture
def monitor() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory / "qmp"


@pytest.fixture
def machine(monitor: Path, tmp_path: Path) -> Iterator[Process]:
    """A QEMU with two block nodes and no guest."""
    argv = [*MACHINE, *DISKS, "-qmp", f"unix:{monitor},server=on,wait=off"]
    with Process(argv, tmp_path / "qemu.log") as machine:
        machine.wait_for(lambda: listens(monitor), "the monitor")
        yield machine


def qmp(monitor: Path, *words: str) -> CompletedProcess[str]:
    return run(NBD_MIGRATE, "qmp", monitor, *words, seconds=30)


def printed(monitor: Path, *words: str) -> str:
    done = qmp(monitor, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(monitor: Path, *words: str, code: int = 1) -> str:
    done = qmp(monitor, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done
    return done.stderr


@pytest.mark.usefixtures("machine")
@pytest.mark.representative
def test_what_the_command_returns_is_printed_whole_or_in_part(monitor: Path) -> None:
    assert json.loads(printed(monitor, "query-status"))["running"] is True
    assert printed(monitor, "query-status", "--get", "running") == "true\n"
    nodes = ("query-named-block-nodes", '{"flat": true}', "--get")
    assert sorted(printed(monitor, *nodes, "*.node-name").split()) == ["one", "zero"]
    assert printed(monitor, *nodes, "one.ro") == "true\n"
    assert printed(monitor, *nodes, "zero.image.virtual-size") == f"{1 << 20}\n"
    assert printed(monitor, *nodes, "0.drv") == "null-co\n"
    # QEMU leaves out what does not apply: that is no mistake.
    assert printed(monitor, *nodes, "one.backing_file").strip() == ""
    assert printed(monitor, "query-jobs", "--get", "*.id").strip() == ""


@pytest.mark.usefixtures("machine")
@pytest.mark.representative
def test_a_path_that_leads_nowhere_is_one_line(monitor: Path) -> None:
    nodes = ("query-named-block-nodes", '{"flat": true}', "--get")
    assert "there is no two in [" in complaint(monitor, *nodes, "two.drv")
    assert "there is no two in [" in complaint(monitor, *nodes, "two")
    assert "there is no imago in {" in complaint(monitor, *nodes, "one.imago.filename")
    assert "there is no deeper in" in complaint(monitor, *nodes, "one.drv.deeper")


@pytest.mark.usefixtures("machine")
@pytest.mark.representative
def test_what_qemu_refuses_is_one_line(monitor: Path) -> None:
    assert "refused blockdev-del: " in complaint(monitor, "blockdev-del", '{"node-name": "nobody"}')
    assert "refused make-coffee: " in complaint(monitor, "make-coffee")


@pytest.mark.representative
def test_wrong_usage_is_one_line(monitor: Path) -> None:
    assert "not JSON" in complaint(monitor, "quit", "now", code=2)
    assert "not JSON" in complaint(monitor, "quit", "[" * 20000, code=2)
    assert "not JSON" in complaint(monitor, "quit", f'{{"speed": {"1" * 5000}}}', code=2)
    assert "a JSON object is wanted" in complaint(monitor, "quit", "[]", code=2)
    assert "more than 0 seconds" in complaint(monitor, "quit", "--timeout", "0", code=2)
    assert "add it" in complaint(monitor, "query-status", "--until", "running", code=2)
    assert "no monitor at" in complaint(monitor, "quit")
    for address in ("b.qmp", "localhost", "localhost:qmp", "localhost:0", ""):
        refused = complaint(Path(address), "quit", code=2)
        assert f"MONITOR: {str(Path(address))!r} is not usable: write a socket's absolute path" in refused


@pytest.mark.usefixtures("machine")
@pytest.mark.representative
def test_arguments_reach_qemu_under_the_names_that_were_given(monitor: Path) -> None:
    for name in ("command", "self", "limit", "a_b"):
        assert f"Parameter '{name}' is unexpected" in complaint(monitor, "query-status", f'{{"{name}": 1}}')


@pytest.mark.usefixtures("machine")
@pytest.mark.representative
def test_waiting_ends_with_what_is_wanted_or_feared_or_the_time(monitor: Path) -> None:
    status = ("query-status", "--get", "status")
    assert printed(monitor, *status, "--until", "paused|running") == "running\n"
    feared = complaint(monitor, *status, "--until", "paused", "--unless", "running|shutdown")
    assert "query-status: status is running" in feared
    late = complaint(monitor, *status, "--until", "paused", "--timeout", "0.5")
    assert "after 0.5 s query-status: status is running, not yet paused" in late


@pytest.mark.representative
def test_waiting_leaves_the_monitor_to_others_and_ends_with_qemu(
    monitor: Path, machine: Process, tmp_path: Path
) -> None:
    words = ("query-status", "--get", "status", "--until", "paused", "--timeout", "60")
    with Process([NBD_MIGRATE, "qmp", monitor, *words], tmp_path / "wait.log") as waiting:
        for _ in range(3):
            assert printed(monitor, "query-status", "--get", "status") == "running\n"
        machine.kill()
        assert waiting.wait(10) == 1
        assert waiting.output().count("\n") == 1
