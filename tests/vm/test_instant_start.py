"""recipes/instant-start.sh: a guest boots from a template far away, while its disk fills behind it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.boot_sector import SECTOR, is_record
from tests.support.delay import delayed
from tests.support.disks import MIB
from tests.support.guests import short_directory
from tests.support.monitors import monitor
from tests.support.processes import Process, check, listens, run, wait_until
from tests.support.recipes import COMMANDS, DIRECTORY
from tests.support.servers import Server, UnixAddress, nbdserve
from tests.support.vms import AS_NOBODY_LATER, DISK_SIZE, QEMU, original_disk

RECIPE = DIRECTORY / "instant-start.sh"
LATE = 0.01
"""Seconds by which the template's answers are late."""


@pytest.fixture
def template(tmp_path: Path) -> Iterator[Server]:
    """The server of the template, on this host."""
    disk = tmp_path / "template.raw"
    disk.write_bytes(original_disk(DISK_SIZE))
    with nbdserve("-r", "-f", "raw", disk, directory=tmp_path) as server:
        yield server


class Guest:
    """A guest that was started by the recipe, on the disk ``vm.raw`` of its directory."""

    def __init__(self, directory: Path, process: Process) -> None:
        self.disk = directory / "vm.raw"
        self.process = process
        self._console = directory / "serial"

    @property
    def records(self) -> int:
        """How many records it has written since its start."""
        return self._console.read_bytes().count(b".") if self._console.exists() else 0

    def wait_until_it_works(self, more: int = 3) -> None:
        """It writes and reads."""
        before = self.records
        wait_until(lambda: self.records >= before + more, "the guest works", 20.0)

    def stream_without_limit(self) -> None:
        """Copy as fast as one can from now on, through the monitor that the recipe has named."""
        named = re.search(r"--qmp (unix:\S+)", self.process.output())
        assert named
        check(COMMANDS / "nbd-overlay", "speed", "0", "--qmp", named[1])

    def wait_until_complete(self) -> None:
        """It has moved to the file."""
        self.process.wait_for_line("is complete, and the guest uses it", seconds=60)

    def end(self) -> None:
        """End it in good order, as by a SIGTERM to the recipe; nothing is left but the disk."""
        self.process.signal(signal.SIGTERM)
        assert self.process.wait(20) in (0, 128 + signal.SIGTERM), self.process.output()

    def wrong_sectors(self) -> list[int]:
        """Sectors that hold neither the template's content nor what the guest may have written there."""
        original, found = original_disk(DISK_SIZE), self.disk.read_bytes()
        assert len(found) == len(original)
        return [
            at // SECTOR
            for at in range(0, len(found), SECTOR)
            if found[at : at + SECTOR] != original[at : at + SECTOR]
            and not is_record(at // SECTOR, found[at : at + SECTOR])
        ]


def environment(directory: Path, **changes: str) -> dict[str, str]:
    """The operator's, with our commands on the PATH and sockets in a directory of the test."""
    path = f"{COMMANDS}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "XDG_RUNTIME_DIR": str(directory), **changes}


@contextmanager
def started(directory: Path, backing: str, *more: str, **changes: str) -> Iterator[Guest]:
    """A guest, started by the recipe."""
    (directory / "serial").unlink(missing_ok=True)
    options = [*QEMU[1:], "-serial", f"file:{directory / 'serial'}", *more]
    argv = [str(RECIPE), backing, str(directory / "vm.raw"), "--", *options]
    with Process(argv, directory / "start.log", env=environment(directory, **changes)) as process:
        yield Guest(directory, process)


def uri(address: object) -> str:
    assert isinstance(address, UnixAddress)
    return address.uri()


def seconds_until(begun: float, happened: Callable[[], bool]) -> float:
    """How long it has taken since ``begun``."""
    wait_until(happened, "the guest works", 30.0, 0.01)
    return time.monotonic() - begun


@pytest.mark.representative
def test_a_guest_starts_from_a_template_far_away_while_its_disk_fills(
    template: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert isinstance(template.address, UnixAddress)
    with delayed(template.address, LATE, tmp_path) as near:
        begun = time.monotonic()
        with started(tmp_path, near.uri(), SPEED=str(MIB)) as guest:
            remote = seconds_until(begun, lambda: guest.records > 0)
            guest.process.wait_for_line("to watch: nbd-overlay status --watch --qmp unix:")
            assert (tmp_path / "vm.raw.map").exists(), "the disk is not complete yet, and the guest works"
            guest.stream_without_limit()
            guest.wait_until_complete()
            guest.wait_until_it_works()
            assert not (tmp_path / "vm.raw.map").exists()
            guest.end()
        assert guest.wrong_sectors() == []
    # The next start needs no template: it is the same guest on a local file.
    begun = time.monotonic()
    with started(tmp_path, "nbd://192.0.2.1/nowhere") as again:
        local = seconds_until(begun, lambda: again.records > 0)
        assert "is complete, and needs no template" in again.process.output()
        again.end()
    assert again.wrong_sectors() == []
    assert list(tmp_path.glob("instant-start.*")) == []
    print(f"first record after {remote:.2f} s from the template, {local:.2f} s from the local file")
    record_property("seconds_beyond_a_local_start", remote - local)


def test_a_guest_that_ends_early_goes_on_where_it_was(template: Server, tmp_path: Path) -> None:
    for number in range(2):
        with started(tmp_path, uri(template.address), SPEED=str(MIB) if number == 0 else "0") as guest:
            guest.wait_until_it_works()
            if number == 1:
                guest.wait_until_complete()
            guest.end()
        assert (tmp_path / "vm.raw.map").exists() == (number == 0)
    assert guest.wrong_sectors() == []


def test_a_template_that_is_away_for_a_while_costs_time_but_no_data(template: Server, tmp_path: Path) -> None:
    address = template.address
    assert isinstance(address, UnixAddress)
    with started(tmp_path, address.uri(), SPEED=str(8 * MIB)) as guest:
        guest.wait_until_it_works()
        template.process.kill()
        time.sleep(1.0)
        with nbdserve("-r", "-f", "raw", tmp_path / "template.raw", directory=tmp_path, at=address):
            guest.wait_until_complete()
        guest.wait_until_it_works()
        guest.end()
    assert guest.wrong_sectors() == []


def overlay_of(directory: Path) -> psutil.Process | None:
    """The nbd-overlay that has the guest's disk, when it is ready."""
    for pid_file in directory.glob("instant-start.*/pid"):
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            return psutil.Process(int(pid_file.read_text()))
    return None


def another_overlay(directory: Path, before: int | None) -> psutil.Process:
    """Wait for one with another process id."""
    found: list[psutil.Process] = []

    def came() -> bool:
        process = overlay_of(directory)
        if process is not None and process.pid != before and process.is_running():
            found.append(process)
        return bool(found)

    wait_until(came, "another nbd-overlay is ready", 30.0)
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_nbd_overlay_that_ends_is_started_again_and_the_guest_only_waits(
    template: Server, tmp_path: Path, number: signal.Signals
) -> None:
    with started(tmp_path, uri(template.address), SPEED=str(MIB // 4)) as guest:
        guest.wait_until_it_works()
        pid = None
        for _ in range(3):
            process = another_overlay(tmp_path, pid)
            pid = process.pid
            process.send_signal(number)
            another_overlay(tmp_path, pid)
            guest.wait_until_it_works()
        told = guest.process.output().count("nbd-overlay has ended; it is started again")
        assert told == 3, guest.process.output()
        guest.stream_without_limit()
        guest.wait_until_complete()
        guest.wait_until_it_works()
        guest.end()
    assert guest.wrong_sectors() == []
    assert list(tmp_path.glob("instant-start.*")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_qemu_that_becomes_another_user_connects_again_and_pivots(template: Server) -> None:
    with short_directory() as directory:
        directory.chmod(0o755)
        changes = {"SPEED": str(MIB // 4), "OWNER": "nobody"}
        with started(directory, uri(template.address), *AS_NOBODY_LATER, **changes) as guest:
            guest.wait_until_it_works()
            process = another_overlay(directory, None)
            process.kill()
            another_overlay(directory, process.pid)
            guest.wait_until_it_works()
            guest.stream_without_limit()
            guest.wait_until_complete()
            guest.wait_until_it_works()
            guest.end()
        assert guest.wrong_sectors() == []
        assert guest.disk.stat().st_uid == 65534


def test_an_nbd_overlay_that_dies_at_once_each_time_is_given_up_and_the_guest_loses_nothing(
    template: Server, tmp_path: Path
) -> None:
    with started(tmp_path, uri(template.address), SPEED=str(MIB // 4), RESTARTS="2") as guest:
        guest.wait_until_it_works()
        pid = None
        for _ in range(3):
            process = another_overlay(tmp_path, pid)
            pid = process.pid
            process.kill()
        guest.process.wait_for_line("nbd-overlay has ended too often; the guest waits, and loses nothing", 30)
        guest.end()
    # It goes on where it was.
    with started(tmp_path, uri(template.address)) as again:
        again.wait_until_complete()
        again.end()
    assert again.wrong_sectors() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6, 1.0, 1.5, 2.0])
@pytest.mark.representative
def test_an_nbd_overlay_may_be_killed_at_any_moment(template: Server, tmp_path: Path, delay: float) -> None:
    """Before QEMU has connected, while the guest boots, and while the disk is finished."""
    with started(tmp_path, uri(template.address), SPEED=str(48 * MIB), RESTARTS="20") as guest:
        process = another_overlay(tmp_path, None)
        time.sleep(delay)
        with suppress(psutil.NoSuchProcess):
            process.kill()
        guest.wait_until_complete()
        guest.wait_until_it_works()
        guest.end()
    assert guest.wrong_sectors() == []
    assert list(tmp_path.glob("instant-start.*")) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_nbd_overlay_may_be_killed_just_before_and_after_the_guest_takes_the_file(
    template: Server, tmp_path: Path, moment: str
) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    kill = f"touch {shims}/done; kill -9 $(cat {tmp_path}/instant-start.*/pid)"
    kill = f'[ "$1" != pivot ] || [ -e {shims}/done ] || {{ {kill}; }}'
    real = f'{COMMANDS}/nbd-migrate "$@" || exit'
    lines = [kill, real] if moment == "before" else [real, kill]
    (shims / "nbd-migrate").write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (shims / "nbd-migrate").chmod(0o755)
    path = f"{shims}:{COMMANDS}:{os.environ['PATH']}"
    with started(tmp_path, uri(template.address), PATH=path) as guest:
        guest.wait_until_complete()
        guest.wait_until_it_works()
        assert (shims / "done").exists()
        guest.end()
    assert guest.wrong_sectors() == []


MAGICS = {
    "LUKS": b"LUKS\xba\xbe\0\2",
    "QED": b"QED\0",
    "qcow2": b"QFI\xfb\0\0\0\3",
    "VMDK": b"KDMV",
    "a whole QED header": None,
}


@pytest.mark.parametrize("kind", MAGICS)
def test_a_complete_disk_is_started_again_whatever_the_guest_keeps_at_its_beginning(
    tmp_path: Path, kind: str
) -> None:
    disk = tmp_path / "vm.raw"
    content = bytearray(original_disk(DISK_SIZE))
    magic = MAGICS[kind]
    if magic is None:
        check("qemu-img", "create", "-q", "-f", "qed", tmp_path / "inner.qed", "16M")
        magic = (tmp_path / "inner.qed").read_bytes()[:64]
    content[: len(magic)] = magic
    disk.write_bytes(content)
    options = [*QEMU[1:], "-serial", "null", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    argv = [str(RECIPE), "nbd://192.0.2.1/nowhere", str(disk), "--", *options]
    with Process(argv, tmp_path / "start.log", env=environment(tmp_path)) as process:
        process.wait_for_line("is complete, and needs no template")
        wait_until(lambda: listens(tmp_path / "qmp"), "QEMU's monitor", 20.0)
        with monitor(tmp_path / "qmp") as guest:
            (node,) = [each for each in guest.execute("query-named-block-nodes") if each["drv"] == "raw"]
            assert node["image"]["virtual-size"] == DISK_SIZE
            guest.execute("quit")
        assert process.wait(20) == 0


def test_a_qed_overlay_is_a_disk_only_for_who_says_so(tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    made = ("create", "--layout", "qed", "--backing", "nbd://192.0.2.1/x", "--size", "1M", image)
    check(COMMANDS / "nbd-overlay", *made)
    refused = run(RECIPE, "nbd://192.0.2.1/x", image, env=environment(tmp_path))
    assert "is a QED overlay; choose another name, or say LAYOUT=flat" in refused.stderr
    changed = environment(tmp_path, LAYOUT="flat", QEMU="true")
    assert run(RECIPE, "nbd://192.0.2.1/x", image, env=changed).returncode == 0


@pytest.mark.parametrize("layout", ["flat", "qed"])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_file_that_is_no_whole_raw_disk_is_not_started(tmp_path: Path, layout: str) -> None:
    backing, image = "nbd://192.0.2.1/x", tmp_path / "vm.raw"
    made = ("create", "--layout", layout, "--backing", backing, "--size", "1M", image)
    check(COMMANDS / "nbd-overlay", *made)
    (tmp_path / "vm.raw.map").unlink(missing_ok=True)
    done = run(RECIPE, backing, image, env=environment(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert str(image) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nbd://192.0.2.1/x"], 2, "give BACKING-URI IMAGE [-- QEMU options]"),
        (["nbd://192.0.2.1/x", "vm.raw", "-m", "2G"], 2, "give BACKING-URI IMAGE [-- QEMU options]"),
        (["nbd+unix:///?socket=/nowhere", "vm.raw"], 1, "/nowhere"),
        (["nbd+unix:///?socket=/nowhere", "nowhere/vm.raw"], 1, "/nowhere"),
    ],
)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], code: int, complaint: str) -> None:
    words = [str(tmp_path / word) if word.endswith(".raw") else word for word in arguments]
    done = run(RECIPE, *words, env=environment(tmp_path), seconds=40)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert complaint in done.stderr
    assert list(tmp_path.iterdir()) == []
