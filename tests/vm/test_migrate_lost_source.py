"""After the cut-over somebody cuts A's image off, or deletes it: the line says so, and what to type helps."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.disks import MIB
from tests.support.pasting import after, pasted_well
from tests.support.processes import wait_until
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.vms import Role, Scene, running, scene

SECONDS = 120.0
STALL = 600.0
"""More than any test takes: nobody waits until then."""


def kill_server(stage: Scene) -> None:
    """The server on A dies, with the readers of other formats that it has started."""
    servers, readers = Role.SERVER.find(stage.directory), readers_of(stage)
    kill(*servers, *readers)


def readers_of(stage: Scene) -> list[psutil.Process]:
    """What the server on A has started."""
    found = []
    for server in Role.SERVER.find(stage.directory):
        with suppress(psutil.NoSuchProcess):
            found += server.children(recursive=True)
    return found


def kill(*processes: psutil.Process) -> None:
    """They die, if they have not with another."""
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()


@pytest.mark.parametrize("killed", [False, True])
def test_an_image_that_was_cut_off_is_named_with_what_is_missing(tmp_path: Path, killed: bool) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB, stall=STALL, recover=STALL)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            content = stage.away.read_bytes()
            os.truncate(stage.away, 40 * MIB)
            if killed:
                kill_server(stage)
            assert run.wait(SECONDS) == 1, run.output()
        line = run.output().splitlines()[-1]
        assert (
            f"{stage.away} on A was cut off: it has {40 * MIB} bytes, and had {64 * MIB}; the guest" in line
        )
        assert "what is on B stays there" in line
        pasted_well(after("to make it so", line))
        assert stage.away.stat().st_size == 64 * MIB
        with stage.away.open("r+b") as file:
            file.write(content)
        pasted_well(after("then", line))
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


def test_a_job_that_reads_touches_or_renames_the_image_costs_nothing(tmp_path: Path) -> None:
    """As a backup, or one that tidies up, while its server lives."""
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            assert stage.away.read_bytes()[:512] == stage.original[:512]
            os.utime(stage.away, (0, 0))
            stage.away.rename(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").rename(stage.away)
            assert run.wait(SECONDS) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_an_image_that_is_gone_with_its_server_is_had_back_by_what_is_to_be_typed(
    tmp_path: Path, how: str
) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB, stall=STALL, recover=STALL)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            if how == "deleted":
                stage.away.unlink()
            else:
                stage.away.rename(tmp_path / "elsewhere")
            kill_server(stage)
            assert run.wait(SECONDS) == 1, run.output()
        line = run.output().splitlines()[-1]
        assert f"there is no {stage.away} on A any more; the guest on B" in line
        assert (
            "the fence still has it open" if how == "deleted" else f"it is {tmp_path}/elsewhere now"
        ) in line
        pasted_well(after("to have it back", line))
        pasted_well(after("then", line))
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


def test_a_qcow2_image_that_is_gone_with_its_reader_is_had_back(tmp_path: Path) -> None:
    stage = Qcow2Disks(tmp_path)
    stage.change("limits", speed=8 * MIB, stall=STALL, recover=STALL)
    with running(stage):
        with stage.run() as run:
            run.wait_for_line("step 5  stream", SECONDS)
            wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU has ended", SECONDS)
            run.wait_for_line(" of 28 MiB", SECONDS)
            image = stage.disks[0].away
            image.unlink()
            kill(*readers_of(stage))
            assert run.wait(SECONDS) == 1, run.output()
        line = run.output().splitlines()[-1]
        assert f"there is no {image} on A any more; the guest on B" in line
        pasted_well(after("to have it back", line))
        pasted_well(after("then", line))
        stage.assert_moved()
