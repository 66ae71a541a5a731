"""What the guest changes at the source while its disk is copied is copied again, however it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import Command, CommandFlags, ExtentFlags
from nbdserve.protocol.extents import Extent
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.inprocess import one_export, running
from tests.support.memory import MemoryBackend
from tests.support.monitors import monitor
from tests.support.overlays import LAYOUTS, NBD_OVERLAY, Daemon, Layout, make_overlay, overlay
from tests.support.processes import Argument, Process, check, listens, run, wait_until
from tests.support.servers import qemu_nbd

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4 * MIB
GRANULE = 64 * KIB
both = pytest.mark.parametrize("layout", LAYOUTS)


class SlowDisk(MemoryBackend):
    """A disk whose answers, once they are made, wait for ``gate`` before they are sent."""

    def __init__(self, size: int, *, zeros: bool = False) -> None:
        super().__init__(size)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0
        self._zeros = zeros

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read what is there now, and tell it when the gate is open."""
        super().read_into(offset, buffer)
        self._wait()

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Tell which half is zeros as it is now, when the gate is open."""
        flags = int(ExtentFlags.HOLE | ExtentFlags.ZERO) if self._zeros else 0
        is_zero = not any(self.content[offset : offset + length])
        self._wait()
        yield Extent(length, flags if is_zero else 0)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Everything may wait."""
        return False

    def _wait(self) -> None:
        if not self.gate.is_set():
            self.waiting += 1
            assert self.gate.wait(300), "nobody has opened the gate"


@contextmanager
def slow(
    layout: Layout, directory: Path, *options: str, zeros: bool = False
) -> Iterator[tuple[SlowDisk, Daemon]]:
    """An overlay, connected, above a disk whose answers wait from now on."""
    disk = SlowDisk(SIZE, zeros=zeros)
    disk.content[:] = bytes(SIZE) if zeros else random_bytes(SIZE)
    with running(one_export(disk), directory) as (_, address):
        image = make_overlay(directory / "overlay", layout, SIZE, address.uri())
        with overlay(image, *options, directory=directory) as daemon:
            daemon.wait_until_connected()
            disk.gate.clear()
            try:
                yield disk, daemon
            finally:
                disk.gate.set()


@both
def test_nobody_waits_for_what_is_on_its_way_and_it_is_not_kept(layout: Layout, tmp_path: Path) -> None:
    new = random_bytes(MIB, seed=2)
    with slow(layout, tmp_path) as (disk, daemon), daemon.guest() as guest, ThreadPoolExecutor() as pool:
        reading = pool.submit(guest.read, 0, MIB)
        wait_until(lambda: disk.waiting > 0, "the source is asked", 60.0)
        disk.content[:MIB] = new
        with daemon.monitor() as qmp:
            assert qmp.execute("overlay-invalidate", offset=0, length=MIB) == {"ranges": 1, "bytes": MIB}
        assert not reading.done()
        disk.gate.set()
        reading.result(60)
        assert guest.read(0, MIB) == new
        wait_until(lambda: daemon.status()["local"] >= MIB, "what was fetched again is kept", 60.0)
        assert guest.read(0, MIB) == new


@both
def test_zeros_that_were_told_of_before_are_not_believed_any_more(layout: Layout, tmp_path: Path) -> None:
    new = random_bytes(MIB, seed=2)
    with slow(layout, tmp_path, zeros=True) as (disk, daemon), daemon.guest() as guest:
        with daemon.monitor() as qmp:
            qmp.execute("block-stream", device="stream")
            wait_until(lambda: disk.waiting > 0, "the source is asked", 60.0)
            disk.content[:MIB] = new
            qmp.execute("overlay-invalidate", ranges=[[0, MIB]])
        disk.gate.set()
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == new + bytes(SIZE - MIB)


@both
def test_streaming_before_the_cut_over_never_ends_and_copies_again_what_changes(
    layout: Layout, tmp_path: Path
) -> None:
    disk = MemoryBackend(SIZE)
    disk.content[:] = random_bytes(SIZE)
    with running(one_export(disk), tmp_path) as (_, address):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
        options = ("--pre-copy", "--stream")
        with overlay(image, *options, directory=tmp_path) as daemon, daemon.monitor() as qmp:
            for number in range(3):
                told = daemon.wait_for_status(60.0, ready=True, local=SIZE)
                assert (told["complete"], told["phase"]) == (False, "running")
                assert qmp.execute("query-block-jobs")[0]["ready"]
                disk.content[number * MIB : (number + 1) * MIB] = random_bytes(MIB, seed=number + 2)
                qmp.execute(
                    "overlay-invalidate",
                    ranges=[[number * MIB, MIB // 2], [number * MIB + MIB // 2, MIB // 2]],
                )
            daemon.wait_for_status(60.0, ready=True, local=SIZE)
            with daemon.guest() as guest:
                assert guest.read(0, SIZE) == bytes(disk.content)
                qmp.execute("overlay-activate")
                daemon.wait_for_status(60.0, phase="done")
                with pytest.raises(ExecuteError, match="the guest runs here"):
                    qmp.execute("overlay-invalidate", offset=0, length=MIB)
    if layout == "flat":
        assert image.read_bytes() == bytes(disk.content)


@pytest.fixture
def changed(tmp_path: Path) -> dict[int, bytes]:
    """A disk as it was, ``old.raw``, and as it is, with a bitmap, ``new.qcow2``: what is new, and where."""
    (tmp_path / "old.raw").write_bytes(random_bytes(SIZE))
    image = tmp_path / "new.qcow2"
    check("qemu-img", "convert", "-O", "qcow2", tmp_path / "old.raw", image)
    check("qemu-img", "bitmap", "--add", "-g", str(GRANULE), image, "round1")
    places = {GRANULE: 7, 5 * GRANULE: 8, 6 * GRANULE: 9, SIZE - GRANULE: 10}
    for place, pattern in places.items():
        check("qemu-io", "-c", f"write -P {pattern} {place} {GRANULE}", image)
    return {place: bytes([pattern]) * GRANULE for place, pattern in places.items()}


@both
def test_a_dirty_bitmap_is_read_from_the_server_that_has_it(
    layout: Layout, tmp_path: Path, changed: dict[int, bytes]
) -> None:
    expected = bytearray((tmp_path / "old.raw").read_bytes())
    with qemu_nbd("-r", "-fraw", tmp_path / "old.raw", directory=tmp_path) as old:
        image = make_overlay(tmp_path / "overlay", layout, SIZE, old.uri())
        with overlay(image, "--pre-copy", "--stream", directory=tmp_path) as daemon:
            daemon.wait_for_status(ready=True)
    for place, data in changed.items():
        expected[place : place + GRANULE] = data
    bitmap = ("-r", "-f", "qcow2", "-B", "round1", tmp_path / "new.qcow2")
    with qemu_nbd(*bitmap, directory=tmp_path) as new:
        options = ("--pre-copy", "--backing", new.uri())
        with overlay(image, *options, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(GRANULE, GRANULE) != changed[GRANULE]
            with daemon.monitor() as qmp:
                answer: dict[str, Any] = qmp.execute("overlay-invalidate", bitmap="round1")
                assert answer == {"ranges": 3, "bytes": 4 * GRANULE}
                assert daemon.status()["local"] == SIZE - 4 * GRANULE
            assert guest.read(0, SIZE) == expected
            command = (NBD_OVERLAY, "invalidate", "--qmp", f"unix:{daemon.qmp_path}", "--bitmap")
            check(*command, "round1", "--backing", new.uri())
            assert daemon.status()["local"] == SIZE - 4 * GRANULE
            done = run(*command, "round2")
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert "no dirty bitmap round2 is exported there" in done.stderr
            nobody = f"nbd+unix:///?socket={tmp_path}/nobody"
            done = run(*command, "round1", "--backing", nobody)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def told_in_the_docs(marker: str) -> list[str]:
    """The lines of docs/overlay.md from an indented line with this in it, up to the end of its paragraph."""
    text = (ROOT / "docs" / "overlay.md").read_text()
    return next(part for part in text.split("\n\n") if marker in part).splitlines()


def test_the_docs_commands_swap_a_running_qemu_s_bitmap_and_invalidate_what_it_says(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    node = {
        "driver": "raw",
        "node-name": "disk0",
        "file": {"driver": "file", "filename": str(tmp_path / "disk")},
    }
    argv: list[Argument] = ["qemu-storage-daemon", "--blockdev", json.dumps(node)]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={tmp_path / 'nbd'}"]
    argv += ["--chardev", f"socket,id=m,path={tmp_path / 'qmp'},server=on,wait=off"]
    argv += ["--monitor", "chardev=m"]
    with ExitStack() as stack:
        daemon = stack.enter_context(Process(argv, tmp_path / "log"))
        daemon.wait_for(lambda: listens(tmp_path / "qmp"), "a monitor")
        qemu = stack.enter_context(monitor(tmp_path / "qmp"))
        qemu.execute("block-dirty-bitmap-add", node="disk0", name="round1", granularity=GRANULE)
        qemu.execute(
            "block-export-add", type="nbd", id="guest", node_name="disk0", name="guest", writable=True
        )
        guest = stack.enter_context(connect(parse_uri(f"nbd+unix:///guest?socket={tmp_path / 'nbd'}")))
        uri = f"nbd+unix:///guest?socket={tmp_path / 'nbd'}"
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri)
        ours = stack.enter_context(overlay(image, "--pre-copy", "--stream", directory=tmp_path))
        ours.wait_for_status(60.0, ready=True)
        new = random_bytes(GRANULE, seed=5)
        guest.start_write(3 * GRANULE, new, CommandFlags(0)).result(60)

        commands = "\n".join(told_in_the_docs('{"execute": "transaction"'))
        decoder, at = json.JSONDecoder(), 0
        for _ in range(2):
            command, length = decoder.raw_decode(commands[at:].lstrip())
            at += len(commands[at:]) - len(commands[at:].lstrip()) + length
            given = {name.replace("-", "_"): value for name, value in command["arguments"].items()}
            qemu.execute(command["execute"], **given)
        assert not commands[at:].strip()
        (line,) = told_in_the_docs("--bitmap round1")
        line = line.replace("unix:/run/vm.qmp", f"unix:{ours.qmp_path}")
        line = line.replace("nbd://hostA/round1", f"nbd+unix:///round1?socket={tmp_path / 'nbd'}")
        check(NBD_OVERLAY, *line.split()[1:])
        ours.wait_for_status(60.0, ready=True)
        with ours.guest() as here:
            assert here.read(0, SIZE) == content[: 3 * GRANULE] + new + content[4 * GRANULE :]


def test_what_cannot_be_invalidated_is_said_in_one_line_and_nothing_is(tmp_path: Path) -> None:
    with slow("flat", tmp_path) as (disk, daemon), daemon.monitor() as qmp, daemon.guest() as guest:
        disk.gate.set()
        guest.read(0, MIB)
        for given, why in (
            ({}, "either offset and length"),
            ({"offset": 0}, "either offset and length"),
            ({"offset": 0, "length": 1, "ranges": []}, "either offset and length"),
            ({"ranges": [], "backing": "nbd://h"}, "either offset and length"),
            ({"ranges": [[0, 4096], [SIZE, 1]]}, "not within the disk"),
            ({"ranges": [[0, 4096], [-1, 1]]}, "not within the disk"),
            ({"ranges": [[0, 4096], [0]]}, "a list of an offset and a length"),
            ({"ranges": [[0, 4096], "x"]}, "a list of an offset and a length"),
            ({"bitmap": "b", "backing": "what"}, "what"),
        ):
            with pytest.raises(ExecuteError, match=why):
                qmp.execute("overlay-invalidate", **given)
        assert daemon.status()["local"] >= MIB
        assert qmp.execute("overlay-invalidate", ranges=[]) == {"ranges": 0, "bytes": 0}
