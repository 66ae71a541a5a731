"""``nbd-overlay serve --channel`` with ``nbdserve channel`` at its other end; this test is both QEMUs."""

from __future__ import annotations

import os
import shlex
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support.channels import LOADED, SIZE, Sender
from tests.support.guests import short_directory
from tests.support.overlays import NBD_OVERLAY, Daemon, make_overlay, overlay
from tests.support.pasting import COMMANDS, blocks, paste
from tests.support.processes import Argument, Process, check, is_alive, listens, run, wait_until
from tests.support.servers import free_tcp_address
from tests.support.tls import Identities

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Place:
    """Two hosts in one directory: disks on A, what B's QEMU waits at, and what both ends must know."""

    directory: Path
    incoming: socket.socket
    stack: ExitStack
    port: int = field(default_factory=lambda: free_tcp_address().port)

    @property
    def token(self) -> Path:
        """The secret."""
        return self.directory / "token"

    def disk(self, name: str) -> Path:
        """A disk on A."""
        path = self.directory / name
        if not path.exists():
            path.write_bytes(os.urandom(SIZE))
        return path

    def options(self, *more: Argument) -> list[Argument]:
        """Those of the overlay that has the channel."""
        waiting = f"unix:{self.directory / 'incoming'}"
        return ["--channel", f"listen:127.0.0.1:{self.port}", "--token-file", self.token,
                "--incoming", waiting, *more]  # fmt: skip

    def image(self, name: str, backing: str) -> Path:
        """An overlay on B."""
        return make_overlay(self.directory / f"{name}.raw", "flat", SIZE, backing)

    def sender(self, *names: str, certificates: Path | None = None) -> Sender:
        """What A's QEMU starts."""
        named = [name if "=" in name else f"{name}={self.disk(name)}" for name in names]
        exports = [word for name in named for word in ("--export", f"{name},format=raw")]
        argv: list[Argument] = ["--connect", f"127.0.0.1:{self.port}", "--token-file", self.token, *exports]
        if certificates is not None:
            argv += ["--tls-certificates", str(certificates)]
        sender = Sender(argv, self.directory)
        self.stack.callback(sender.close)
        return sender

    def arrive(self, sender: Sender) -> None:
        """All RAM goes over."""
        sender.write(b"RAM")
        qemu, _ = self.incoming.accept()
        qemu.settimeout(60.0)
        assert qemu.recv(3) == b"RAM"
        qemu.sendall(LOADED)
        assert sender.read(len(LOADED)) == LOADED
        assert sender.end() == 0
        qemu.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with short_directory() as directory, ExitStack() as stack, socket.socket(socket.AF_UNIX) as incoming:
        incoming.bind(str(directory / "incoming"))
        incoming.listen()
        incoming.settimeout(60.0)
        made = Place(directory, incoming, stack)
        made.token.touch(mode=0o600)
        made.token.write_text("0123456789abcdef" * 4)
        yield made


def wait_for_channel(daemon: Daemon, **wanted: object) -> None:
    """Wait until ``query-overlay`` tells this of the channel."""
    wait_until(
        lambda: all(daemon.status()["channel"][name] == value for name, value in wanted.items()),
        f"{wanted} of the channel",
        interval=0.1,
    )


def test_the_disk_comes_through_the_channel_and_the_source_ends_by_itself(place: Place) -> None:
    image = place.image("b", "migrate:disk")
    metrics = free_tcp_address()
    told = ["--metrics", f"{metrics.host}:{metrics.port}"]
    with overlay(image, *place.options(*told), directory=place.directory) as daemon:
        assert daemon.status()["armed"]
        sender = place.sender("disk")
        with daemon.guest() as guest:
            wait_for_channel(daemon, connected=True)
            # What is read before the guest is here is not kept: it may change at the source.
            assert guest.read(0, 4096) == place.disk("disk").read_bytes()[:4096]
            assert daemon.status()["local"] == 0
            worker = sender.worker
            place.arrive(sender)
            daemon.wait_for_status(armed=False)
            assert guest.read(0, 4096) == place.disk("disk").read_bytes()[:4096]
            assert daemon.status()["local"] >= 4096
            status = check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
            assert "RAM loaded" in status
            assert " held of " in status
            page = urllib.request.urlopen(f"http://{metrics.host}:{metrics.port}/metrics", timeout=60).read()
            assert b"nbd_overlay_channel_connected 1.0" in page
            assert b"nbd_overlay_channel_bound_bytes" in page
        check(NBD_OVERLAY, "stream", "--qmp", f"unix:{daemon.qmp_path}")
        check(NBD_OVERLAY, "wait", "--qmp", f"unix:{daemon.qmp_path}")
        wait_until(lambda: not is_alive(worker), "A's end has ended")
        # Who waits for that anyway learns it.
        check(NBD_OVERLAY, "channel-done", "--qmp", f"unix:{daemon.qmp_path}")
        assert "channel  done" in check(NBD_OVERLAY, "status", "--qmp", f"unix:{daemon.qmp_path}")
    assert "channel: done" in sender.log.read_text()
    assert image.read_bytes() == place.disk("disk").read_bytes()


def test_the_monitor_tells_what_happens_on_the_channel(place: Place) -> None:
    image = place.image("b", "migrate:disk")
    with overlay(image, *place.options("--stream"), directory=place.directory) as daemon:
        client = QEMUMonitorProtocol(str(daemon.qmp_path))
        client.connect()
        client.settimeout(60.0)
        try:
            sender = place.sender("disk")
            place.arrive(sender)
            names: list[str] = []
            # Job and channel tell of themselves, each in its own thread.
            while not {"CHANNEL_DONE", "BLOCK_JOB_COMPLETED"} <= {*names}:
                event = client.pull_event(wait=60.0)
                assert event is not None
                names.append(str(event["event"]))
        finally:
            client.close()
    channel = [name for name in names if name.startswith("CHANNEL_")]
    assert channel == ["CHANNEL_BEGUN", "CHANNEL_RAM_BEGUN", "CHANNEL_RAM_LOADED", "CHANNEL_DONE"]


def test_what_the_page_says_is_what_to_type_and_tls_lets_in_only_who_is_certified(place: Place) -> None:
    create, serve = blocks(ROOT / "docs/overlay.md", "Over one connection")[0]
    (place.directory / "tls").mkdir()
    certified = Identities.create(place.directory / "tls")
    values = {
        "/var/lib/images": str(place.directory),
        "/run/": f"{place.directory}/",
        "/etc/pki/nbd": str(certified.server),
        "/etc/nbd.token": str(place.token),
        "192.0.2.2:10810": f"127.0.0.1:{place.port}",
        "20G": str(SIZE),
    }

    def typed(line: str) -> list[str]:
        for word, value in values.items():
            assert word in create + serve, word
            line = line.replace(word, value)
        return shlex.split(line)

    (place.directory / "incoming").rename(place.directory / "vm.incoming")
    done = paste(shlex.join(typed(create)))
    assert done.returncode == 0, done.stderr
    program, *words = typed(serve)
    with Process([COMMANDS / program, *words, "--stream"], place.directory / "serve.log") as daemon:
        daemon.wait_for(lambda: listens(place.directory / "vm.sock"), "it is served")
        stranger = place.sender("disk", certificates=certified.stranger)
        assert stranger.wait() == 1
        assert "TLS: " in stranger.errors
        plain = place.sender("disk")
        assert plain.wait() == 1
        sender = place.sender("disk", certificates=certified.client)
        worker = sender.worker
        place.arrive(sender)
        wait_until(lambda: not is_alive(worker), "A's end has ended")
    assert (place.directory / "vm.raw").read_bytes() == place.disk("disk").read_bytes()


def test_two_disks_use_one_channel_and_the_source_is_kept_until_both_are_complete(place: Place) -> None:
    shared = place.directory / "shared"
    first = place.image("first", "migrate:one")
    second = place.image("second", f"nbd+unix:///two?socket={shared}")
    with overlay(first, *place.options("--channel-socket", shared), directory=place.directory) as owner:
        control = f"unix:{owner.qmp_path}"
        with overlay(second, "--armed", directory=place.directory) as other:
            sender = place.sender("one", "two")
            worker = sender.worker
            place.arrive(sender)
            owner.wait_for_status(armed=False)
            refused = run(NBD_OVERLAY, "channel-done", "--qmp", control)
            assert "not all of this disk is here" in refused.stderr
            check(NBD_OVERLAY, "stream", "--qmp", control)
            check(NBD_OVERLAY, "wait", "--qmp", control)
            other.wait_until_connected()
            refused = run(NBD_OVERLAY, "channel-done", "--qmp", control)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
            assert "others use the source's disks still" in refused.stderr
            assert is_alive(worker)
            check(NBD_OVERLAY, "activate", "--qmp", f"unix:{other.qmp_path}")
            check(NBD_OVERLAY, "stream", "--qmp", f"unix:{other.qmp_path}")
            check(NBD_OVERLAY, "wait", "--qmp", f"unix:{other.qmp_path}")
            check(NBD_OVERLAY, "channel-done", "--qmp", control)
            wait_until(lambda: not is_alive(worker), "A's end has ended")
    assert first.read_bytes() == place.disk("one").read_bytes()
    assert second.read_bytes() == place.disk("two").read_bytes()


def test_an_overlay_that_is_complete_tells_a_source_that_comes_back_that_it_is_needed_no_more(
    place: Place,
) -> None:
    image = place.image("b", "migrate:disk")
    with overlay(image, *place.options("--stream"), directory=place.directory) as daemon:
        sender = place.sender("disk")
        worker = sender.worker
        place.arrive(sender)
        daemon.wait_for_status(complete=True)
        wait_until(lambda: not is_alive(worker), "A's end has ended")
    # As if nbd-overlay had been killed before it could say so.
    with overlay(image, *place.options(), directory=place.directory):
        source: list[Argument] = ["--connect", f"127.0.0.1:{place.port}", "--token-file", place.token]
        done = run(NBD_OVERLAY.with_name("nbdserve"), "channel", *source, "--resume",
                   "--export", f"disk={place.disk('disk')},format=raw")  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_read_before_any_source_has_come_fails_soon_so_that_a_qemu_can_start(place: Place) -> None:
    image = place.image("b", "migrate:disk")
    with overlay(image, *place.options(), directory=place.directory) as daemon, daemon.guest() as guest:
        with pytest.raises(OSError, match="Input/output error"):
            guest.read(0, 512)
        place.sender("disk")
        wait_for_channel(daemon, connected=True)
        assert guest.read(0, 512) == place.disk("disk").read_bytes()[:512]


def refused_before_any_ram(place: Place, sender: Sender, why: str) -> None:
    """The migration fails for this reason, and B's QEMU has got nothing."""
    sender.write(b"RAM")
    assert sender.wait() == 1
    assert why in sender.errors
    qemu, _ = place.incoming.accept()
    assert qemu.recv(1) == b""
    qemu.close()


def test_a_guest_whose_disk_is_another_or_cannot_be_had_stays_where_it_is(place: Place) -> None:
    (place.directory / "larger").write_bytes(bytes(SIZE + 512))
    image = place.image("b", "migrate:disk")
    with overlay(image, *place.options(), directory=place.directory):
        larger = place.sender("disk=" + str(place.directory / "larger"))
        refused_before_any_ram(place, larger, f"the disk has {SIZE} bytes, what answers there {SIZE + 512}")
        refused_before_any_ram(place, place.sender("other"), "the guest would be without its disk")
        place.arrive(place.sender("disk"))


def test_an_overlay_that_is_started_again_when_the_guest_has_just_come_knows_that(place: Place) -> None:
    image = place.image("b", "migrate:disk")
    with overlay(image, *place.options(), directory=place.directory) as daemon:
        place.arrive(place.sender("disk"))
        daemon.wait_for_status(armed=False)
        wait_until(lambda: daemon.status()["local"] > 0, "something is kept")
        # It is flushed behind that.
        time.sleep(0.5)
        daemon.process.kill()
        daemon.process.wait(20.0)
    with overlay(image, *place.options("--stream"), directory=place.directory) as daemon:
        assert not daemon.status()["armed"]
        daemon.wait_for_status(complete=True)
    assert image.read_bytes() == place.disk("disk").read_bytes()


def complaint(*argv: Argument, code: int) -> str:
    """The one line with which a command fails."""
    done = run(NBD_OVERLAY, *argv)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stdout + done.stderr
    return done.stderr


def test_what_makes_no_sense_is_one_line(place: Place) -> None:
    new, sock = place.directory / "new", place.directory / "sock"
    assert "give --size" in complaint("create", "--backing", "migrate:disk", new, code=2)
    assert "write migrate:NAME" in complaint("create", "--size", "1M", "--backing", "migrate:", new, code=2)
    assert not new.exists()
    through = place.image("through", "migrate:disk")
    other = place.image("other", "nbd://localhost/disk")
    line = complaint("serve", through, "-k", sock, code=2)
    assert "its backing migrate:disk comes through a channel: add --channel listen:PLACE" in line
    line = complaint("serve", other, "-k", sock, *place.options(), code=2)
    assert "its backing is nbd://localhost:10809/disk, which comes through no channel" in line
    assert "--incoming is for the channel" in complaint(
        "serve", through, "-k", sock, "--incoming", "x", code=2
    )
    listen: list[Argument] = ["serve", through, "-k", sock, "--channel"]
    assert "write listen:HOST:PORT" in complaint(*listen, "connect:x", "--token-file", place.token, code=2)
    assert "--token-file FILE" in complaint(*listen, "listen:localhost:0", code=2)
    line = complaint(*listen, "listen:0.0.0.0:0", "--token-file", place.token, code=2)
    assert "without TLS only the loopback" in line
    assert "reached only by nbd-overlay serve --channel" in complaint("verify", through, code=1)
