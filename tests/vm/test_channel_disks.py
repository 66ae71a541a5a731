"""A real guest with several disks over one connection, by hand: each disk has its own nbd-overlay."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.channels import NBDSERVE
from tests.support.guests import short_directory
from tests.support.many_disks import SIZES, GuestDisk, ManyDisks
from tests.support.overlays import NBD_OVERLAY
from tests.support.processes import Argument, Process, check, is_alive, listens, wait_until
from tests.support.servers import free_tcp_address
from tests.support.vms import QEMU, monitor, running


@pytest.mark.exhaustive
def test_a_guests_disks_come_through_one_channel_each_to_a_daemon_of_its_own() -> None:
    with short_directory() as directory, ExitStack() as stack:
        guest = ManyDisks(directory, sizes=SIZES[:2])
        stack.enter_context(running(guest))
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text("0123456789abcdef" * 4)
        place = f"127.0.0.1:{free_tcp_address().port}"
        shared, incoming = directory / "shared", directory / "incoming"
        first = ["--channel", f"listen:{place}", "--token-file", str(token), "--incoming", f"unix:{incoming}",
                 "--channel-socket", str(shared)]  # fmt: skip
        serve(stack, guest.disks[0], "migrate:disk0", *first)
        serve(stack, guest.disks[1], f"nbd+unix:///disk1?socket={shared}", "--armed")
        b = stack.enter_context(Process(waiting_qemu(guest, incoming), directory / "b.log"))
        wait_until(lambda: listens(incoming), "B's QEMU waits", 30.0)
        migrate(guest, place, token)
        guest.wait_until_guest_works("b")
        with monitor(guest.monitor_a) as a:
            a.execute("quit")
        control = [f"unix:{disk.target}.qmp" for disk in guest.disks]
        check(NBD_OVERLAY, "activate", "--qmp", control[1])
        for word in ("stream", "wait"):
            for each in control:
                check(NBD_OVERLAY, word, "--qmp", each)
        worker = int((directory / "channel.pid").read_text())
        check(NBD_OVERLAY, "channel-done", "--qmp", control[0])
        wait_until(lambda: not is_alive(worker), "A's end has ended")
        guest.wait_until_guest_works("b")
        counter = guest.stop_guest_on_b()
        with monitor(guest.monitor_b) as qemu:
            qemu.execute("quit")
        assert b.wait(30.0) == 0
        assert guest.verdict(counter) == []


def serve(stack: ExitStack, disk: GuestDisk, backing: str, *options: str) -> None:
    """Make a disk's overlay, and serve it."""
    size = str(len(disk.original))
    check(NBD_OVERLAY, "create", "--layout", "flat", "--size", size, "--backing", backing, disk.target)
    path = Path(f"{disk.target}.nbd")
    control = ["--qmp", f"unix:{disk.target}.qmp", "--simple-replies"]
    serving: list[Argument] = [NBD_OVERLAY, "serve", disk.target, "-k", path, *control, *options]
    stack.enter_context(Process(serving, disk.target.with_suffix(".log")))
    wait_until(lambda: listens(path), "it is served")


def waiting_qemu(guest: ManyDisks, incoming: Path) -> list[str]:
    """The QEMU to which the guest comes."""
    words = [*QEMU, *guest.devices(), "-serial", f"file:{guest.directory / 'b.serial'}"]
    words += ["-qmp", f"unix:{guest.monitor_b},server=on,wait=off", "-incoming", f"unix:{incoming}"]
    for disk in guest.disks:
        node = f"driver=nbd,node-name={disk.drive},server.type=unix,server.path={disk.target}.nbd"
        words += ["-blockdev", f"{node},reconnect-delay=60"]
    return words


def migrate(guest: ManyDisks, place: str, token: Path) -> None:
    """Have A's QEMU start its end, and see the guest go."""
    exports = [word for disk in guest.disks for word in ("--export", f"{disk.drive}={disk.image},format=raw")]
    words: list[Argument] = [NBDSERVE, "channel", "--connect", place, "--token-file", token, *exports]
    log = guest.directory / "channel.log"
    words += ["--log", log, "--pid-file", guest.directory / "channel.pid"]
    wanted = [{"capability": each, "state": True} for each in ("events", "return-path")]
    with monitor(guest.monitor_b) as b:
        b.execute("migrate-set-capabilities", capabilities=wanted)
    with monitor(guest.monitor_a) as a:
        a.execute("migrate-set-capabilities", capabilities=wanted)
        a.execute("migrate", uri=f"exec:{shlex.join(map(str, words))}")

        def state() -> object:
            return a.execute("query-migrate").get("status")

        wait_until(lambda: state() in ("completed", "failed"), "its end", 60.0)
        assert state() == "completed", log.read_text()
