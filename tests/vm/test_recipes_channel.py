"""The five recipes of the single channel, as docs/recipes.md has them, with real guests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from recipes.demo import run as demo
from recipes.demo.stage import Stage
from recipes.demo.verdict import Phases
from tests.support.channels import Road
from tests.support.guests import MIB, guest_running, short_directory, staged
from tests.support.pasting import COMMANDS, blocks
from tests.support.processes import Process, is_alive, run, wait_until
from tests.support.servers import free_tcp_address
from tests.support.vms import DISK_SIZE, Scene, monitor, scene

ROOT = Path(__file__).resolve().parents[2]
EXPORTS, STEPS = blocks(ROOT / "docs/recipes.md", "Five steps over one connection")
QEMU_OF_PAGE = re.compile(r" qemu-system-x86_64 .*")
TOKEN = "0123456789abcdef" * 4


class Operator:
    """Whoever types what the page says, with other values of the variables that it exports."""

    def __init__(self, variables: Mapping[str, str], qemu: tuple[str, ...]) -> None:
        named = {word.partition("=")[0] for line in EXPORTS for word in line.partition("#")[0].split()[1:]}
        # On the loopback it goes without.
        assert set(variables) == named - {"CERTIFICATES"}
        self.variables = dict(variables)
        self._qemu = qemu

    def environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        """The variables, and our commands on the PATH."""
        return {**self.variables, **changes, "PATH": f"{COMMANDS}:{os.environ['PATH']}"}

    def type(self, step: int, **changes: str) -> subprocess.CompletedProcess[str]:
        """Type the page's line of this step."""
        line = STEPS[step - 1]
        assert f"/{step}-" in line
        arguments = self._qemu if step == 3 else ()
        line = QEMU_OF_PAGE.sub("", line)
        return run("bash", "-c", f'{line} "$@"', "bash", *arguments, seconds=180.0,
                   env=self.environment(changes), cwd=ROOT)  # fmt: skip

    def must(self, step: int, **changes: str) -> str:
        """Type it; it must succeed."""
        done = self.type(step, **changes)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def fails(self, step: int, **changes: str) -> str:
        """Type it; it must fail, and say so on one line."""
        done = self.type(step, **changes)
        assert done.returncode == 1, f"{done.args}\n{done.stdout}{done.stderr}{self.logs()}"
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def logs(self) -> str:
        """What A's end of the channel has logged."""
        log = Path(self.variables["DISK"] + ".channel.log")
        return f"\n{log}:\n{log.read_text()}" if log.exists() else ""

    def status(self) -> str:
        """What nbd-overlay says of itself."""
        done = run(COMMANDS / "nbd-overlay", "status", "--qmp", f"unix:{self.variables['OVERLAY']}.qmp")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def overlay(self) -> int:
        """The process id of nbd-overlay."""
        return int(Path(self.variables["OVERLAY"] + ".pid").read_text())

    def ends_at_a(self) -> list[psutil.Process]:
        """A's end of the channel, as far as it is there."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if "channel" in words and self.variables["TOKEN_FILE"] in words and "--connect" in words:
                found.append(process)
        return found

    def end_everything(self) -> None:
        """Kill what the steps have left running."""
        for file in (self.variables["OVERLAY"] + ".pid", self.variables["DESTINATION_QMP"] + ".pid"):
            if Path(file).exists() and (text := Path(file).read_text().strip()) and is_alive(int(text)):
                os.kill(int(text), signal.SIGKILL)
        for process in self.ends_at_a():
            process.kill()


def operator_of(directory: Path, image: Path, overlay: Path, size: int, monitors: tuple[Path, Path],
                qemu: tuple[str, ...]) -> Operator:  # fmt: skip
    """The operator, with a token and a free port."""
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    place = f"127.0.0.1:{free_tcp_address().port}"
    return Operator(
        {
            "DISK": str(image),
            "SIZE": str(size),
            "OVERLAY": str(overlay),
            "LISTEN": place,
            "CONNECT": place,
            "TOKEN_FILE": str(token),
            "SOURCE_QMP": str(monitors[0]),
            "DESTINATION_QMP": str(monitors[1]),
        },
        qemu,
    )


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path, 64 * MIB) as stage:
        yield stage


@pytest.mark.representative
def test_the_five_steps_move_a_guest_and_nothing_is_stopped_at_the_source(stage: Stage) -> None:
    overlay = stage.sockets / "b.raw"
    stage.overlay.symlink_to(overlay)
    monitors = stage.monitor("a"), stage.monitor("b")
    operator = operator_of(
        stage.directory, stage.image, overlay, stage.original.size, monitors, stage.guest_on_b.qemu
    )
    with guest_running(stage) as source:
        try:
            operator.must(1)
            operator.must(2)
            operator.must(3)
            assert "not here yet (armed)" in operator.status()
            before = stage.guest_on_a.announced
            assert "the guest runs on B; it stood still for" in operator.must(4)
            cut_over = stage.guest_on_a.announced
            assert len(operator.ends_at_a()) == 1
            # It is needed no more: A's QEMU has ended, its child serves the disk.
            assert source.wait(30.0) == 0
            assert "RAM loaded" in operator.status()
            operator.must(5, SPEED=str(16 * MIB))
            streamed = stage.guest_on_b.announced or cut_over
            wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")
            assert "channel: done" in operator.logs()
            wait_until(lambda: not is_alive_by(Path(f"{overlay}.pid")), "nbd-overlay ends")
            asyncio.run(demo.write_for(0.5, stage.guest_on_b))
            memory = asyncio.run(stage.guest_on_b.verify())
            asyncio.run(stage.guest_on_b.stop())
        finally:
            operator.end_everything()
    left = tuple(f"{path} is left" for path in overlay.parent.glob("b.raw.*"))
    phases = Phases(before, cut_over, streamed, memory.written)
    verdict = demo.judge(stage, demo.Evidence(memory, phases, left))
    assert verdict.holds, list(verdict.lines())


def is_alive_by(pid_file: Path) -> bool:
    """Whether the process of a pid file is there."""
    return pid_file.exists() and is_alive(int(pid_file.read_text()))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Scene, Operator, Road]]:
    """A small guest that runs on A, its operator, and the way from A to B, which can be cut."""
    with short_directory() as directory, scene(directory) as guest:
        operator = operator_of(
            directory,
            guest.image,
            guest.overlay,
            DISK_SIZE,
            (guest.monitor_a, guest.monitor_b),
            guest.plan.destination.qemu,
        )
        road = Road(int(operator.variables["LISTEN"].rpartition(":")[2]))
        operator.variables["CONNECT"] = f"127.0.0.1:{road.port}"
        try:
            yield guest, operator, road
        finally:
            road.close()
            operator.end_everything()


def slow_down(guest: Scene) -> None:
    """Let RAM take a while."""
    with monitor(guest.monitor_a) as a:
        a.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 16})


def arrived(guest: Scene, operator: Operator) -> None:
    """Steps 1 to 4: the guest runs on B."""
    for step in (1, 2, 3, 4):
        operator.must(step)
    guest.wait_until_guest_works("b")


def goes_again(guest: Scene, operator: Operator) -> None:
    """A guest that a slow migration has left on A goes to B as fast as it may, from step 3 on."""
    with monitor(guest.monitor_a) as a:
        a.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
    operator.must(3)
    operator.must(4)
    guest.wait_until_guest_works("b")
    complete(guest, operator)


def complete(guest: Scene, operator: Operator) -> None:
    """Step 5: the whole disk is on B, as the guest has it, and A's end has ended."""
    operator.must(5)
    guest.wait_until_guest_works("b")
    wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")
    guest.quit_b()
    assert guest.wrong_sectors() == []


@pytest.mark.representative
def test_the_end_at_a_and_nbd_overlay_may_both_be_killed_and_started_again(
    small: tuple[Scene, Operator, Road],
) -> None:
    guest, operator, _ = small
    operator.variables["CONNECT"] = operator.variables["LISTEN"]
    arrived(guest, operator)
    (end_at_a,) = operator.ends_at_a()
    end_at_a.kill()
    wait_until(lambda: "not connected" in operator.status(), "the loss is noticed")
    again = ["bash", operator.variables["DISK"] + ".channel.log.resume"]
    with Process(again, guest.directory / "resumed.log") as resumed:
        wait_until(lambda: "not connected" not in operator.status(), "the source is back")
        guest.wait_until_guest_works("b")
        killed = operator.overlay()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not is_alive(killed), "nbd-overlay is dead")
        operator.must(2)
        # It knows from the image that the guest is here already.
        assert "armed" not in operator.status()
        wait_until(lambda: "not connected" not in operator.status(), "the source is back")
        guest.wait_until_guest_works("b")
        complete(guest, operator)
        assert resumed.wait(30) == 0


@pytest.mark.representative
def test_a_connection_that_breaks_while_ram_goes_over_leaves_the_guest_at_a_and_it_may_be_tried_again(
    small: tuple[Scene, Operator, Road],
) -> None:
    guest, operator, road = small
    for step in (1, 2, 3):
        operator.must(step)
    slow_down(guest)
    with Process(["bash", "-c", STEPS[3]], guest.directory / "4.log", env=operator.environment({}),
                 cwd=ROOT) as migrating:  # fmt: skip
        wait_until(lambda: "RAM under-way" in operator.status(), "RAM moves")
        road.cut()
        assert migrating.wait(60) == 1
        assert "4-migrate.sh: the guest runs on here, on A, as the migration failed: " in migrating.output()
    guest.wait_until_guest_works("a")
    wait_until(lambda: operator.ends_at_a() == [], "A's end has ended")
    assert "not here yet (armed)" in operator.status()
    wait_until(lambda: not is_alive_by(Path(f"{guest.monitor_b}.pid")), "B's QEMU has ended")
    goes_again(guest, operator)


def test_a_connection_that_breaks_after_the_ram_costs_time_but_no_data(
    small: tuple[Scene, Operator, Road],
) -> None:
    guest, operator, road = small
    arrived(guest, operator)
    for _ in range(3):
        road.cut()
        wait_until(lambda: "not connected" not in operator.status(), "the source is back")
        guest.wait_until_guest_works("b")
    # For a while there is no way at all: the guest waits.
    road.is_closed = True
    road.cut()
    wait_until(lambda: "not connected" in operator.status(), "the loss is noticed")
    road.is_closed = False
    guest.wait_until_guest_works("b")
    complete(guest, operator)


def test_a_wrong_token_moves_nothing(small: tuple[Scene, Operator, Road]) -> None:
    guest, operator, _ = small
    for step in (1, 2, 3):
        operator.must(step)
    wrong = guest.directory / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("f" * 64)
    assert "the guest runs on here, on A" in operator.fails(4, TOKEN_FILE=str(wrong))
    guest.wait_until_guest_works("a")
    told = operator.status()
    assert "not connected" in told
    assert "RAM none" in told
    # B's QEMU still waits.
    operator.must(4)
    guest.wait_until_guest_works("b")
    complete(guest, operator)


def test_a_guest_whose_disk_has_another_size_stays_at_a(
    small: tuple[Scene, Operator, Road],
) -> None:
    guest, operator, _ = small
    operator.must(1, SIZE=str(DISK_SIZE - 512))
    operator.must(2)
    operator.must(3)
    assert f"the disk has {DISK_SIZE - 512} bytes, what answers there {DISK_SIZE}" in operator.fails(4)
    guest.wait_until_guest_works("a")


def test_an_idle_nbd_overlay_that_is_started_again_before_the_migration_takes_it_all_the_same(
    small: tuple[Scene, Operator, Road],
) -> None:
    guest, operator, _ = small
    operator.must(1)
    operator.must(2)
    killed = operator.overlay()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not is_alive(killed), "nbd-overlay is dead")
    operator.must(2)
    assert "not here yet (armed)" in operator.status()
    operator.must(3)
    operator.must(4)
    guest.wait_until_guest_works("b")
    complete(guest, operator)
