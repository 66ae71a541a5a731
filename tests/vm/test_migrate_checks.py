"""What nbd-migrate run refuses before it starts anything, and what it refuses in B's QEMU: one line each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import Process, check, listens, wait_until
from tests.support.servers import free_tcp_address
from tests.support.vms import QEMU, Scene, monitor, running, scene, stopped_with


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    with scene(tmp_path) as made:
        yield made


def assert_refused(stage: Scene, complaint: str) -> None:
    """The migration ends with one line and code 1 or 2, nothing is left, and the guest works on A."""
    with stage.run() as run:
        assert run.wait(30.0) in (1, 2), run.output()
    last = run.output().splitlines()[-1]
    assert complaint in last, run.output()
    assert "Traceback" not in run.output()
    wait_until(lambda: not stage.started(), "everything that was started has ended")
    stage.wait_until_guest_works("a")
    assert stage.capabilities_of_a() == []


@pytest.mark.representative
def test_one_look_at_both_hosts_finds_what_does_not_fit(stage: Scene, tmp_path: Path) -> None:
    """Each of these would be found with a guest of its own; one guest serves them all."""
    plan, there = stage.plan, tmp_path / "there"
    refused = ("ssh", "-F", "none", "-p", str(free_tcp_address().port), "127.0.0.1")
    there.touch()
    mistakes: list[tuple[Callable[[], None], str]] = [
        (lambda: stage.change("source", qmp=str(tmp_path / "no.qmp")), "A's QEMU: no monitor at "),
        (lambda: stage.change("source", node="disk1"), "A's QEMU has no block node or device 'disk1'"),
        (lambda: stage.change("source", node="", image="/x.raw"), "/x.raw is not the file of any disk in A"),
        (
            lambda: stage.change("source", bin="/nowhere"),
            "there is no /nowhere/nbdserve on A; install it",
        ),
        (lambda: stage.change("destination", bin="/nowhere"), "there is no /nowhere/nbd-overlay on B"),
        (
            lambda: stage.change("source", shell=refused),
            "nbd-migrate: there is no way to A by 'ssh -F none -p",
        ),
        (lambda: stage.change("destination", shell=refused), "Connection refused; see that sshd runs there"),
        (lambda: stage.change("destination", qemu=("qemu-system-z80",)), "there is no qemu-system-z80 on B"),
        (lambda: stage.change("destination", image=str(there)), "there exists on B; remove it if it is left"),
        (
            lambda: stage.change("destination", image="/nowhere/b.qed"),
            "no directory for /nowhere/b.qed on B",
        ),
        (lambda: stage.change("finish", move_aside=str(there)), "finish.move_aside: "),
        (lambda: stage.change("finish", move_aside="/nowhere/a"), "there is no directory /nowhere on A"),
        (lambda: stage.change("finish", move_aside="/proc/a"), "is on another file system than"),
        (
            lambda: stage.change("export", uri=f"nbd+unix:///?socket={there}"),
            "step 1 (export the source's disk)",
        ),
    ]
    for make, complaint in mistakes:
        stage.plan = plan
        make()
        assert_refused(stage, complaint)
        assert not stage.overlay.exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("virtio-blk-pci,drive=disk0,werror=stop", "the -device of disk0 has rerror=auto, and an export"),
        ("virtio-blk-pci,drive=disk0,rerror=stop,werror=report", "has werror=report"),
        (
            "nvme,serial=1,drive=disk0",
            "the -device of disk0 has no rerror: use virtio-blk",
        ),
        ("virtio-rng-pci", "no -device has drive=disk0, so the guest would not have this disk"),
        ("virtio-blk-pci,drive=disk7", "B's QEMU ended with code 1: qemu-system-x86_64: "),
    ],
)
def test_the_destination_must_wait_when_the_export_is_away(stage: Scene, device: str, complaint: str) -> None:
    stage.change("destination", qemu=(*QEMU, "-device", device))
    assert_refused(stage, complaint)
    assert not stage.overlay.exists()


DIMM = "-object memory-backend-ram,id=m,size=128M -device pc-dimm,memdev=m"


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("word", "other", "complaint"),
    [
        ("16", "32", "32 MiB of RAM, A's 16 MiB: write -m size=16M"),
        ("pc", "q35", "the machine type pc-q35-"),
        ("-nodefaults", "-nodefaults -smp 2", "2 processors, A's 1: write -smp 1"),
        (
            "16",
            f"size=16M,slots=2,maxmem=1G {DIMM}",
            "128 MiB in memory devices, A's nothing: give it those of A",
        ),
    ],
)
@pytest.mark.representative
def test_a_destination_that_is_another_machine_is_refused_before_anything_is_sent(
    stage: Scene, word: str, other: str, complaint: str
) -> None:
    words = [other.split() if each == word else [each] for each in stage.plan.destination.qemu]
    stage.change("destination", qemu=tuple(itertools.chain.from_iterable(words)))
    assert_refused(stage, f"destination.qemu: B's machine has {complaint}")
    with monitor(stage.monitor_a) as a:
        assert a.execute("query-migrate") == {}
    assert not stage.overlay.exists()


def test_what_b_could_not_load_is_said_in_its_own_words(tmp_path: Path) -> None:
    stage = Scene(tmp_path)
    with Process([*stage.source_qemu(), "-device", "virtio-rng-pci"], tmp_path / "a.log") as source:
        source.wait_for(lambda: listens(stage.monitor_a), "a monitor")
        stage.wait_until_guest_works("a")
        with stage.run() as run:
            assert run.wait(60.0) == 1
        assert "load of migration failed: Invalid argument: Unknown savevm section" in run.output()
        assert "virtio-rng" in run.output()
        assert "the guest runs on A as before" in run.output()
        stage.wait_until_guest_works("a")


def test_a_disk_that_does_not_end_with_a_sector_is_refused_with_a_remedy(tmp_path: Path) -> None:
    stage = Scene(tmp_path)
    with stage.image.open("ab") as image:
        image.write(b"x")
    with running(stage):
        size, wanted = len(stage.original) + 1, len(stage.original) + 512
        assert_refused(stage, f"has {size} bytes, no multiple of 512")
        check("truncate", "--size", str(wanted), stage.image)
        with stage.run() as run:
            assert run.wait(60.0) == 0, run.output()


def test_a_disk_that_was_opened_by_a_relative_path_moves(tmp_path: Path) -> None:
    stage = Scene(tmp_path)
    argv = [word.replace(f"filename={stage.image}", "filename=a.raw") for word in stage.source_qemu()]
    with Process(argv, tmp_path / "a.log", cwd=tmp_path), stopped_with(stage):
        stage.wait_until_guest_works("a")
        with stage.run() as run:
            assert run.wait(60.0) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_a_paused_guest_is_not_migrated(stage: Scene) -> None:
    with monitor(stage.monitor_a) as a:
        a.execute("stop")
    with stage.run() as run:
        assert run.wait(30.0) == 1
    assert "the guest on A does not run, it is in state paused; start it first" in run.output()
    with monitor(stage.monitor_a) as a:
        assert a.state == "paused"


@pytest.mark.representative
def test_a_disk_that_is_not_raw_and_not_said_to_be_otherwise_is_refused(tmp_path: Path) -> None:
    stage = Scene(tmp_path)
    stage.image.unlink()
    check("qemu-img", "create", "-q", "-f", "qcow2", stage.image, "1M")
    argv = [word.replace("driver=raw", "driver=qcow2") for word in stage.source_qemu()]
    with Process(argv, tmp_path / "a.log") as source:
        source.wait_for(lambda: listens(stage.monitor_a), "a monitor")
        with stage.run() as run:
            assert run.wait(30.0) == 2
    assert 'a.raw is qcow2: say so in its [[disk]], format = "qcow2"' in run.output()


def test_a_monitor_that_is_taken_is_not_given_to_the_destination(stage: Scene) -> None:
    argv = [
        QEMU[0],
        "-machine",
        "none",
        "-display",
        "none",
        "-qmp",
        # Not in the words by which B's QEMU is known.
        f"unix:{stage.monitor_b},wait=off,server=on",
    ]
    with Process(argv, stage.directory / "other.log") as other:
        other.wait_for(lambda: listens(stage.monitor_b), "a monitor")
        assert_refused(stage, f"something answers at {stage.monitor_b} already")
        assert other.running


def test_a_place_for_the_ram_that_cannot_be_is_found_before_the_guest_is_touched(stage: Scene) -> None:
    stage.change("destination", migration="unix:/nowhere/migration")
    assert_refused(stage, "there is no directory for /nowhere/migration on B; make it: mkdir -p /nowhere")


def test_a_place_for_the_ram_that_qemu_refuses_leaves_the_guest_untouched(stage: Scene) -> None:
    stage.change("destination", migration=f"unix:{stage.directory}")
    assert_refused(stage, "step 3 (launch the destination): B's QEMU refused migrate-incoming")
