"""B's QEMU runs as another user than who starts it: what it may not do is found before the guest moves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from tests.support.guests import short_directory
from tests.support.processes import wait_until
from tests.support.vms import AS_NOBODY_LATER, Role, Scene, running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
SECONDS = 90.0
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture(params=["overlay", "qemu"])
def stage(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A guest on A, and a plan in which B's QEMU gives up root, in a directory that everybody may enter."""
    with short_directory() as directory:
        directory.chmod(0o755)
        made = Scene(directory, request.param)
        become_nobody(made)
        made.change("limits", speed=32 << 20)
        with running(made):
            yield made


def become_nobody(stage: Scene) -> None:
    """Let B's QEMU give up root."""
    nobodys = stage.directory / "nobody"
    nobodys.mkdir()
    os.chown(nobodys, 65534, 65534)
    qemu = (*stage.plan.destination.qemu, *AS_NOBODY_LATER)
    stage.change("destination", qemu=qemu, migration=f"unix:{nobodys}/migration")


def refusal(stage: Scene) -> str:
    """Why the migration is refused; the guest works on A then, and nothing is left."""
    with stage.run() as run:
        assert run.wait(SECONDS) == 1, run.output()
    last = run.output().splitlines()[-1]
    assert last.endswith("; the guest runs on A as before")
    wait_until(lambda: not stage.started(), "everything that was started has ended")
    assert not stage.overlay.exists()
    stage.wait_until_guest_works("a")
    return last


@pytest.mark.representative
def test_a_qemu_that_could_not_go_on_is_refused_and_what_to_write_helps(stage: Scene) -> None:
    said = refusal(stage)
    assert re.search(r"B's QEMU runs as nobody and will not be able to connect to \S+ again \(", said)
    owner = re.search(
        r'; write owner = "(\w+)" in \[destination\], and let nobody enter each directory', said
    )
    assert owner
    stage.change("destination", owner=owner[1])
    with stage.run_doomed("PROGRESS", Role.SERVER) as run:
        assert run.wait(SECONDS) == 0, run.output()
    stage.wait_until_guest_works("b")
    assert stage.overlay.stat().st_uid == 65534
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


@pytest.mark.parametrize("stage", ["overlay"], indirect=True)
def test_it_connects_again_to_an_overlay_that_is_started_again_and_pivots(stage: Scene) -> None:
    stage.change("destination", owner="nobody:nogroup", mode="0660")
    with stage.run_doomed("PROGRESS", Role.OVERLAY) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert "it is started again" in run.output()
    stage.wait_until_guest_works("b")
    status = stage.overlay.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (65534, 65534, 0o660)
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.parametrize("stage", ["overlay"], indirect=True)
def test_a_directory_that_it_may_not_enter_is_told_from_an_owner_that_is_missing(stage: Scene) -> None:
    stage.change("destination", owner="nobody")
    closed = stage.directory / "closed"
    closed.mkdir(mode=0o700)
    stage.overlay = closed / "b.raw"
    stage.change("destination", image=str(stage.overlay))
    assert (
        refusal(stage).partition("); ")[2].startswith("let nobody enter each directory above it; the guest")
    )


class Unreadable(Scene):
    """A guest whose QEMU on A was started by root, and is nobody's by now."""

    by_drive = True

    def source_qemu(self) -> list[str]:
        """A's command line."""
        words = [*super().source_qemu(), *AS_NOBODY_LATER]
        at = words.index("-blockdev")
        if self.by_drive:
            words[at : at + 2] = ["-drive", f"if=none,id=disk0,format=raw,file={self.image}"]
        return words


def test_a_qemu_that_could_not_give_its_disk_up_is_refused_before_anything_starts() -> None:
    with short_directory() as directory:
        directory.chmod(0o755)
        stage = Unreadable(directory)
        become_nobody(stage)
        stage.change("destination", owner="nobody")
        stage.image.chmod(0o600)
        with running(stage):
            assert not stage.started()
            with stage.run() as run:
                assert run.wait(SECONDS) == 1
            said = run.output()
            assert f"source.image: A's QEMU cannot open {stage.image} any more (Could not open" in said
            assert "step 1" not in said
            stage.image.chmod(0o644)
            with stage.run() as run:
                assert run.wait(SECONDS) == 0, run.output()
            stage.wait_until_guest_works("b")
            stage.quit_b()
            assert stage.wrong_sectors() == []


def test_one_that_gives_it_up_without_opening_it_again_moves_and_that_is_told() -> None:
    with short_directory() as directory:
        directory.chmod(0o755)
        stage = Unreadable(directory)
        stage.by_drive = False
        become_nobody(stage)
        stage.change("destination", owner="nobody")
        stage.image.chmod(0o600)
        with running(stage):
            with stage.run() as run:
                assert run.wait(SECONDS) == 0, run.output()
            assert "if its -blockdev says auto-read-only it will keep its guest" in run.output()


@pytest.mark.parametrize("stage", ["overlay"], indirect=True)
def test_the_file_alone_may_be_out_of_reach(stage: Scene) -> None:
    """Who may write to a socket may connect to it; a disk must be read, too."""
    stage.change("destination", mode="0622")
    said = refusal(stage)
    assert f"will not be able to open {stage.overlay} in the end" in said


@pytest.mark.parametrize("stage", ["overlay"], indirect=True)
def test_a_qemu_that_is_started_as_another_user_needs_the_same(stage: Scene) -> None:
    nobodys = stage.directory / "nobody"
    qemu = [word for word in stage.plan.destination.qemu if word not in AS_NOBODY_LATER]
    qemu = [word.replace(f"{stage.directory}/b.serial", f"{nobodys}/b.serial") for word in qemu]
    stage.monitor_b = nobodys / "b.qmp"
    stage.change("destination", qemu=(*AS_NOBODY, *qemu), qmp=str(stage.monitor_b))
    said = refusal(stage)
    assert "Permission denied" in said
    assert "if it runs as another user, write that as owner in [destination]" in said
    stage.change("destination", owner="nobody")
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    (stage.directory / "b.serial").symlink_to(nobodys / "b.serial")
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []
