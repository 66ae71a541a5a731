"""B is lost before its guest's disks were complete: the guest boots again, on B or A, and has what it wrote.

The guest (tests/support/boot_sector.py) tells each record when that was acknowledged, and each is flushed: a
BIOS asks for no write cache. So what it has told is on its disk, whatever was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.boot_sector import RECORDS, SECTOR, is_record, newest, number_in
from tests.support.disks import MIB
from tests.support.many_disks import ManyDisks
from tests.support.overlays import make_overlay
from tests.support.pasting import COMMANDS, after, blocks, in_places, paste, pasted_well
from tests.support.processes import Argument, Process, run, wait_until
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.recipes import DIRECTORY
from tests.support.servers import UnixAddress, free_tcp_address
from tests.support.vms import NBD_MIGRATE, QEMU, ROOT, Role, running, scene

OVERLAY = NBD_MIGRATE.with_name("nbd-overlay")
PAGE = ROOT / "docs" / "migrate.md"
PATHS = {"PATH": f"{COMMANDS}:{os.environ['PATH']}"}

SECONDS = 120.0
NAME = "a0"
ON_B = (Role.B, Role.OVERLAY, Role.SUPERVISOR_OF_B, Role.SUPERVISOR_OF_OVERLAY)
ON_A = (Role.SERVER, Role.SUPERVISOR_OF_SERVER, Role.FENCE)


class Lost(ManyDisks):
    """A guest whose host B can be lost: what a boot empties there is a directory."""

    def __init__(self, directory: Path, *, sizes: Sequence[int] = (32 * MIB, 8 * MIB)) -> None:
        super().__init__(directory, sizes=sizes)
        keep_in_memory(self)


class LostQcow2(Qcow2Disks):
    """The same, whose disks are in qcow2 images on A, over others, and in a raw one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        keep_in_memory(self)


def keep_in_memory(stage: ManyDisks) -> None:
    """B's monitors, and A's export, are in directories that a reboot takes."""
    for host in "ab":
        (stage.directory / f"run-{host}").mkdir()
    stage.monitor_b = stage.directory / "run-b" / "b.qmp"
    stage.export = stage.directory / "run-a" / "nbd"
    stage.change("destination", qmp=str(stage.monitor_b))
    stage.change("export", uri=f"nbd+unix:///vm?socket={stage.export}")
    stage.change("limits", speed=6 * MIB)


@contextlib.contextmanager
def lost(stage: ManyDisks, *, moment: str = "PROGRESS") -> Iterator[int]:
    """Everything on B dies while the disks follow; the number of records that the guest has told of."""
    with running(stage):
        with stage.run_doomed(moment, *ON_B) as doomed:
            assert doomed.wait(SECONDS) == 1, doomed.output()
        wait_until(lambda: not any(role.find(stage.directory) for role in ON_B), "all on B is dead", 30.0)
        yield stage.dots("a") + stage.dots("b")


def reboot(stage: ManyDisks, host: str) -> None:
    """End all that is left on a host, and empty what is in its memory."""
    for role in ON_A if host == "a" else ON_B:
        for process in role.find(stage.directory):
            process.kill()
    shutil.rmtree(stage.directory / f"run-{host}")


def told(*words: str) -> str:
    """What a command says that succeeds."""
    return pasted_well(" ".join(["nbd-migrate", *words]))


def refused(*words: str) -> str:
    """What a command says that fails."""
    done = paste(" ".join(["nbd-migrate", *words]))
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def wrong_on_a(stage: ManyDisks, records: int) -> list[str]:
    """Sectors of A's images that are not what the guest has told of, or was about to write then."""
    wrong = []
    for index, disk in enumerate(stage.disks):
        found = stage.content(disk.image)
        for at in range(0, len(found), SECTOR):
            content, before, sector = found[at : at + SECTOR], disk.original[at : at + SECTOR], at // SECTOR
            if sector not in RECORDS:
                right = content == before
            else:
                lasts = (records, records + 1, records + 2)
                wanted = {newest(sector, last, index, len(stage.disks)) for last in lasts}
                right = number_in(content) in wanted - {0} or (content == before and 0 in wanted)
            if not right:
                wrong.append(f"{disk.drive}: sector {sector}: {content[:16].hex()}")
    return wrong


def works_on_a(stage: ManyDisks) -> None:
    """The guest runs there, and nothing of a migration."""
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started() - {Role.B_AGAIN}, f"nothing is left: {stage.started()}", 30.0)


@pytest.mark.parametrize("rebooted", [(), ("b",), ("a", "b")], ids=["killed", "rebooted", "both"])
def test_a_guest_that_was_lost_with_b_is_booted_there_again(
    tmp_path: Path, rebooted: tuple[str, ...]
) -> None:
    stage = Lost(tmp_path)
    with lost(stage):
        for host in rebooted:
            reboot(stage, host)
        told("recover", NAME)
        stage.wait_until_guest_works("b")
        stage.wait_until_only({Role.B_AGAIN})
        assert journal.last(NAME).phase is Phase.DONE
        for process in Role.B_AGAIN.find(stage.directory):
            process.kill()
        wait_until(lambda: not Role.B_AGAIN.find(stage.directory), "it ends")
        assert stage.verdict() == []


@pytest.mark.parametrize("rebooted", [(), ("a", "b")], ids=["killed", "both rebooted"])
@pytest.mark.representative
def test_a_guest_that_was_lost_with_b_is_booted_on_a_with_all_that_it_wrote(
    tmp_path: Path, rebooted: tuple[str, ...]
) -> None:
    stage = Lost(tmp_path)
    with lost(stage) as records:
        for host in rebooted:
            reboot(stage, host)
        said = paste(f"nbd-migrate recover {NAME} --on a --no-boot")
        assert said.returncode == 0, said.stdout + said.stderr
        assert stage.dots("b") > 0
        assert wrong_on_a(stage, records) == []
        assert "recovered" in told("status", NAME)
        for words in (("recover", NAME), ("resume", NAME, "--boot")):
            assert "to start it there: nbd-migrate recover a0 --on a" in refused(*words)
        told("recover", NAME, "--on", "a")
        works_on_a(stage)
        # What is told removes what is on B.
        pasted_well(after("to remove them", said.stdout + said.stderr))
        assert not list(stage.directory.glob("b?.raw")) + list(stage.directory.glob("b?.raw.map"))


def test_disks_in_qcow2_are_recovered_on_a(tmp_path: Path) -> None:
    stage = LostQcow2(tmp_path)
    with lost(stage) as records:
        told("recover", NAME, "--on", "a", "--no-boot")
        assert wrong_on_a(stage, records) == []
        told("recover", NAME, "--on", "a")
        works_on_a(stage)


def test_killed_at_each_entry_of_its_journal_it_goes_on(tmp_path: Path) -> None:
    stage = Lost(tmp_path)
    with lost(stage) as records:
        for entry in range(1, 30):
            kill = f"inject=fsync:signal=KILL:when={entry}"
            strace = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", kill]
            done = run(*strace, NBD_MIGRATE, "recover", NAME, "--on", "a", "--no-boot", seconds=SECONDS)
            wait_until(lambda: journal.actor(NAME) == 0, "nobody is at work", SECONDS)
            if done.returncode == 0:
                break
            if journal.last(NAME).phase is Phase.RECOVERING:
                assert "recover a0 --on a" in refused("resume", NAME)
                assert "recover a0 --on a" in refused("recover", NAME)
        else:
            pytest.fail("it never came to its end")
        assert entry > 3
        assert wrong_on_a(stage, records) == []


def test_from_a_copy_of_b_s_files_the_guest_is_booted_on_a_while_b_is_off(tmp_path: Path) -> None:
    stage = Lost(tmp_path)
    with lost(stage) as records:
        copies = tmp_path / "carried"
        copies.mkdir()
        for disk in stage.disks:
            for path in (disk.target, Path(f"{disk.target}.map")):
                shutil.move(path, copies)
        told("recover", NAME, "--on", "a", "--from", str(copies), "--b-is-off", "--no-boot")
        assert wrong_on_a(stage, records) == []
        told("recover", NAME, "--on", "a")
        works_on_a(stage)


def test_what_can_not_be_committed_is_refused_while_the_guest_may_still_be_booted_on_b(
    tmp_path: Path,
) -> None:
    stage = Lost(tmp_path)
    with lost(stage):
        words = ("recover", NAME, "--on", "a", "--from", f"{tmp_path}/")
        data = stage.disks[1].target
        beside = Path(f"{data}.map")
        # As a copy without one of its files, and of another guest.
        beside.rename(tmp_path / "elsewhere")
        assert "is missing: put it back" in refused(*words, "--b-is-off")
        (tmp_path / "elsewhere").rename(beside)
        assert "no such file" in refused("recover", NAME, "--on", "a", "--from", f"{tmp_path}/typo")
        for path in (data, beside):
            path.rename(f"{path}.kept")
        make_overlay(data, "flat", 4 * MIB, "nbd://localhost/x")
        assert "another guest's?" in refused(*words)
        for path in (data, beside):
            Path(f"{path}.kept").rename(path)
        # What was complete before the guest was lost does not tell what that wrote.
        monitor = f"unix:{tmp_path / 'x.qmp'}"
        serving: list[Argument] = [
            OVERLAY,
            "serve",
            "--layout",
            "flat",
            data,
            "-k",
            tmp_path / "x.sock",
            "--qmp",
            monitor,
        ]
        with Process([*serving, "--stream"], tmp_path / "x.log") as completing:
            completing.wait_for_line("everything is here", seconds=60)
            completing.terminate()
        assert "--on b" in refused("recover", NAME, "--on", "a")
        assert journal.last(NAME).phase is Phase.STREAM
        told("recover", NAME)
        stage.wait_until_guest_works("b")


def test_whoever_interrupts_it_is_told_what_goes_on_with_it(tmp_path: Path) -> None:
    stage = Lost(tmp_path)
    with lost(stage) as records:
        words: list[Argument] = [NBD_MIGRATE, "recover", NAME, "--on", "a", "--no-boot"]
        with Process(words, tmp_path / "recover.log") as recovering:
            recovering.wait_for_line("is written to", seconds=60)
            recovering.signal(signal.SIGINT)
            assert recovering.wait(60) == 130
        [line] = [each for each in recovering.output().splitlines() if "interrupted" in each]
        assert "nbd-overlay" not in refused("fence", "--lift", NAME, "--yes")
        pasted_well(after("to go on", line))
        assert wrong_on_a(stage, records) == []


def test_a_guest_that_lives_on_b_is_not_booted_a_second_time(tmp_path: Path) -> None:
    stage = Lost(tmp_path)
    with running(stage):
        with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR) as doomed:
            doomed.wait(SECONDS)
        for host in "ab":
            assert "B's QEMU has the guest" in refused("recover", NAME, "--on", host)
        stage.wait_until_guest_works("b")
        told("resume", NAME)
        assert "complete and need nothing on A" not in refused("recover", NAME, "--on", "a")
        for process in Role.B.find(stage.directory):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not Role.B.find(stage.directory), "B's QEMU ends")
        assert "complete and need nothing on A" in refused("recover", NAME, "--on", "a")
        told("recover", NAME)
        stage.wait_until_guest_works("b")


ON_B_AGAIN, AGAIN_ON_A, CARRIED, BY_HAND_ON_B, BY_HAND_ON_A = blocks(PAGE, "B is lost")


@pytest.mark.parametrize("commands", [ON_B_AGAIN, AGAIN_ON_A, CARRIED], ids=["on B", "on A", "carried"])
def test_what_the_page_says_boots_the_guest_again(tmp_path: Path, commands: Sequence[str]) -> None:
    stage = Lost(tmp_path)
    with lost(stage):
        carried = tmp_path / "carried"
        carried.mkdir()
        if commands is CARRIED:
            for disk in stage.disks:
                for path in (disk.target, Path(f"{disk.target}.map")):
                    shutil.move(path, carried)
        for command in in_places(commands, {" vm": f" {NAME}", "/srv/carried": str(carried)}):
            pasted_well(command)
        stage.wait_until_guest_works("b" if commands is ON_B_AGAIN else "a")


def test_what_the_page_says_by_hand_boots_the_guest_on_b(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run_doomed("PROGRESS", *ON_B) as doomed:
            assert doomed.wait(SECONDS) == 1, doomed.output()
        guest = " ".join([*QEMU[1:], "-serial", f"file:{tmp_path / 'b.serial'}"])
        places = {
            "nbd://192.0.2.1/vm": f"'{UnixAddress(stage.export).uri('vm')}'",
            "/var/lib/images/vm.raw": str(stage.overlay),
            "-m 2G": guest,
            "recipes/": f"{DIRECTORY}/",
        }
        [command] = in_places(BY_HAND_ON_B, places)
        with Process(["bash", "-c", f"exec {command}"], tmp_path / "again.log", env=PATHS) as again:
            stage.wait_until_guest_works("b")
            again.wait_for_line("is complete, and the guest uses it", seconds=60)
            again.terminate()
        assert stage.wrong_sectors(interrupted=True) == []


def test_what_the_page_says_by_hand_brings_the_disk_to_a(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run_doomed("PROGRESS", *ON_B) as doomed:
            assert doomed.wait(SECONDS) == 1, doomed.output()
        for role in ON_A:
            for process in role.find(tmp_path):
                process.kill()
        wait_until(lambda: not any(role.find(tmp_path) for role in ON_A), "all on A has ended", 30.0)
        address = free_tcp_address()
        pid = tmp_path / "commit.pid"
        places = {
            "nbd://192.0.2.1/vm": address.uri("vm"),
            "192.0.2.1": f"{address.host} -p {address.port}",
            "/run/commit.pid": str(pid),
        }
        on_a = in_places(BY_HAND_ON_A[:2], {**places, "/var/lib/images/vm.raw": str(stage.image)})
        on_b = in_places(BY_HAND_ON_A[2:], {**places, "/var/lib/images/vm.raw": str(stage.overlay)})
        for command in on_a:
            pasted_well(command)
        pasted_well(on_b[0])
        psutil.Process(int(pid.read_text())).terminate()
        wait_until(lambda: not pid.exists(), "the server ends")
        found = stage.image.read_bytes()
        wrong = [
            at // SECTOR
            for at in range(0, len(found), SECTOR)
            if found[at : at + SECTOR] != stage.original[at : at + SECTOR]
            and not is_record(at // SECTOR, found[at : at + SECTOR])
        ]
        assert wrong == []
        records = stage.dots("a") + stage.dots("b")
        assert any(number_in(found[at * SECTOR : (at + 1) * SECTOR]) == records for at in RECORDS)
