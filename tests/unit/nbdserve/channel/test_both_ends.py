"""Both ends of a channel in one process, with this test in the place of the two QEMUs and of NBD."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nbdserve.channel import accepted, destination, places
from nbdserve.channel.child.pipes import RamPipes
from nbdserve.channel.destination import Destination, Event, Settings
from nbdserve.channel.dialling import Way
from nbdserve.channel.local_ends import LocalEnd
from nbdserve.channel.multiplexer import Multiplexer
from nbdserve.channel.source import Source, SourceSettings
from nbdserve.channel.terms import REQUESTS, Limits
from nbdserve.channel.wire.frames import (
    Bye,
    Close,
    CloseReason,
    Control,
    Decoder,
    Done,
    Frame,
    Open,
    Ram,
    RamStatus,
    encode,
)
from nbdserve.channel.wire.greeting import NONCE, Claim, Connector, Mode
from nbdserve.common.errors import OperatorError
from nbdserve.common.threads import promised
from tests.support.processes import PATIENCE, wait_until

TOKEN = b"0123456789abcdef" * 4
LOADED, FAILED = b"\0\1\0\4\0\0\0\0", b"\0\1\0\4\0\0\0\1"
"""What QEMU says on the return path when it has loaded everything, or could not."""
_WAIT = 10.0 * PATIENCE


class Ends:
    """A destination that lasts, and sources that connect to it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "channel"
        self.events: list[Event] = []
        self.stack = ExitStack()
        self.incoming = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        self.incoming.bind(str(directory / "incoming"))
        self.incoming.listen()
        self.incoming.settimeout(_WAIT)
        self.destination = Destination(
            places.listen(f"unix:{self.path}", encrypted=False),
            Settings(TOKEN, str(directory / "incoming"), lasting=True),
            lambda event, _: self.events.append(event),
        )
        self.stack.callback(self.destination.close)
        self.destination.start()

    def connect(self, ram: RamPipes | None = None) -> Source:
        """A source that is connected: in exec mode with ``ram``."""
        ways = [Way(places.UnixPlace(str(self.path)))]
        settings = SourceSettings(ways, TOKEN, resume=ram is None, patience=_WAIT)
        connected = threading.Event()
        source = Source(settings, lambda visitor: visitor.sock.close(), ram, connected.set)
        carried = promised("source", source.run)

        def end() -> None:
            source.stop()
            with suppress(OperatorError):
                carried.result(_WAIT)

        self.stack.callback(end)
        assert connected.wait(_WAIT)
        # The source has its answer a moment before the destination uses the connection.
        wait_until(lambda: self.destination.status().connected, "the destination has the source")
        return source

    def migrate(self, source: Source) -> tuple[socket.socket, socket.socket]:
        """The two QEMUs' sockets, between which a stream of RAM has begun."""
        at_source, given = socket.socketpair()
        source.send(given)
        at_destination, _ = self.incoming.accept()
        for each in (at_source, at_destination):
            each.settimeout(_WAIT)
            self.stack.callback(each.close)
        at_source.sendall(b"RAM")
        assert at_destination.recv(3) == b"RAM"
        return at_source, at_destination


class Connection:
    """A source's end of which this test says every frame."""

    def __init__(self, ends: Ends) -> None:
        before = ends.destination.status().connections
        self.sock = ends.stack.enter_context(socket.socket(socket.AF_UNIX))
        self.sock.settimeout(_WAIT)
        greet(self.sock, ends)
        wait_until(lambda: ends.destination.status().connections > before, "the destination has the source")

    def say(self, frame: Control) -> None:
        self.sock.sendall(encode(frame))

    def bring_ram(self, ends: Ends) -> socket.socket:
        """The socket of the destination's QEMU, to which a stream of RAM leads from now on."""
        self.say(Open(1))
        qemu, _ = ends.incoming.accept()
        ends.stack.callback(qemu.close)
        wait_until(lambda: ends.destination.status().ram == "under-way", "RAM is under way")
        return qemu

    def hears(self, wanted: Frame) -> bool:
        """Whether this is said before the other end hangs up."""
        decoder = Decoder()
        while data := self.sock.recv(1 << 16):
            if wanted in decoder.feed(memoryview(data)):
                return True
        return False


def greet(client: socket.socket, ends: Ends) -> None:
    """Connect, and be accepted."""
    client.connect(str(ends.path))
    greeting = Connector(TOKEN, Claim(Mode.RESUME, 0, Limits().offer(REQUESTS)), os.urandom(NONCE))
    client.sendall(greeting.first)
    while greeting.needed:
        if said := greeting.receive(client.recv(greeting.needed, socket.MSG_WAITALL)):
            client.sendall(said)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path)
    with made.stack:
        yield made


def test_a_second_stream_of_ram_is_judged_by_its_own_return_path(ends: Ends) -> None:
    source = ends.connect()
    a, b = ends.migrate(source)
    b.sendall(FAILED)
    assert a.recv(len(FAILED)) == FAILED
    again, b_again = ends.migrate(source)
    b.close()
    assert a.recv(1) == b""
    b_again.sendall(LOADED)
    assert again.recv(len(LOADED)) == LOADED
    wait_until(lambda: Event.RAM_LOADED in ends.events, "the guest has arrived")
    assert ends.destination.status().ram == "loaded"
    assert ends.events.count(Event.RAM_FAILED) == 1


def test_status_can_be_asked_while_streams_come_and_go(ends: Ends) -> None:
    ends.connect()
    before = sys.getswitchinterval()
    over, failures = threading.Event(), list[Exception]()

    def ask() -> None:
        while not over.is_set():
            try:
                ends.destination.status()
            except RuntimeError as error:
                failures.append(error)
                return

    asking = threading.Thread(target=ask)
    sys.setswitchinterval(1e-6)
    try:
        asking.start()
        for _ in range(15):
            with ExitStack() as opened:
                for _ in range(100):
                    with suppress(BlockingIOError, OSError):
                        opened.enter_context(ends.destination.open())
    finally:
        over.set()
        asking.join()
        sys.setswitchinterval(before)
    assert not failures


def test_the_process_that_qemu_waits_for_ends_when_qemu_does_though_the_destination_takes_nothing(
    ends: Ends,
) -> None:
    told: list[tuple[bool, str]] = []
    stream, write_end = os.pipe()
    read_end, answers = os.pipe()
    ends.stack.callback(os.close, read_end)
    ends.connect(RamPipes(stream, answers, lambda loaded, why: told.append((loaded, why))))
    qemu, _ = ends.incoming.accept()
    ends.stack.callback(qemu.close)
    os.set_blocking(write_end, False)
    # Up to the destination's window, and all that sockets and pipes hold.
    while select.select([], [write_end], [], 0.5)[1]:
        os.write(write_end, bytes(1 << 16))
    os.close(write_end)
    wait_until(lambda: bool(told), "QEMU is let go")
    loaded, why = told[0]
    assert not loaded
    assert "QEMU has broken the migration off" in why


def test_a_stream_whose_user_has_given_up_waiting_is_reset(ends: Ends) -> None:
    ends.connect()
    client, other = socket.socketpair()
    other.close()
    client.close()
    with pytest.raises(OSError, match="given it up"):
        ends.destination.adopt(client)
    wait_until(lambda: ends.destination.status().streams == 0, "the stream is no more")


def test_descriptors_that_run_out_at_the_door_hang_up_on_who_came_in_one_line(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(_WAIT)
    filling: list[int] = []
    with client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard))
        try:
            with suppress(OSError):
                while True:
                    filling.append(os.dup(0))
            # One for who is accepted, and one more, which a connection does not come by with.
            for _ in range(2):
                os.close(filling.pop())
            greet(client, ends)
            assert client.recv(1) == b""
        finally:
            for each in filling:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in caplog.text
    assert not ends.destination.status().connected
    ends.connect()


def test_a_source_that_is_stopped_does_not_try_the_other_ways_first(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        silent.settimeout(_WAIT)
        ways = [Way(places.UnixPlace(str(tmp_path / "silent")))] * 30
        settings = SourceSettings(ways, TOKEN, resume=True, patience=_WAIT, limits=Limits(greeting=0.5))
        source = Source(settings, lambda visitor: visitor.sock.close())
        carried = promised("source", source.run)
        silent.accept()[0].close()
        waiting, _ = silent.accept()
        with waiting:
            source.stop()
            carried.result(5.0)


def test_a_goodbye_that_answers_nothing_is_none(ends: Ends) -> None:
    source = Connection(ends)
    source.say(Bye())
    assert source.hears(Close(CloseReason.PROTOCOL, "channel: BYE without DONE"))
    assert Event.DONE not in ends.events
    again = Connection(ends)
    ends.destination.say_done()
    assert again.hears(Done())
    again.say(Bye())
    wait_until(lambda: Event.DONE in ends.events, "the source has taken leave")


def test_the_end_of_a_connection_that_was_replaced_says_nothing_of_its_successors_ram(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "_REPLACED", _WAIT)
    former = Connection(ends)
    former.bring_ram(ends).sendall(FAILED)
    wait_until(lambda: Event.RAM_FAILED in ends.events, "the first RAM has failed")
    successor = Connection(ends)
    qemu = successor.bring_ram(ends)
    former.sock.shutdown(socket.SHUT_WR)
    assert not former.hears(Ram(RamStatus.LOADED))
    qemu.sendall(LOADED)
    assert successor.hears(Ram(RamStatus.LOADED))
    assert ends.events.count(Event.RAM_FAILED) == 1


def test_who_has_replaced_a_connection_is_told_what_its_ram_has_come_to(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as moment:
        # That in which the thread of the former one has not begun to take leave.
        moment.setattr(accepted.Connection, "end", lambda *_: None)
        qemu = Connection(ends).bring_ram(ends)
        successor = Connection(ends)
        qemu.sendall(LOADED)
        assert successor.hears(Ram(RamStatus.LOADED))


def no_more_watches(_: Multiplexer, end: LocalEnd) -> None:
    end.close()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_ram_that_cannot_be_watched_has_failed_and_other_ram_may_come(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as short:
        # As fs.epoll.max_user_watches does, which is one for all processes.
        short.setattr(Multiplexer, "attach", no_more_watches)
        Connection(ends).say(Open(1))
        wait_until(lambda: Event.RAM_FAILED in ends.events, "RAM has failed")
    ends.incoming.accept()[0].close()
    Connection(ends).bring_ram(ends)


def test_a_source_that_cannot_watch_its_qemu_fails_the_migration_in_one_line(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Multiplexer, "attach", no_more_watches)
    reader, writer = os.pipe(), os.pipe()
    ends.stack.callback(os.close, reader[1])
    ends.stack.callback(os.close, writer[0])
    told: list[tuple[bool, str]] = []
    ram = RamPipes(reader[0], writer[1], lambda loaded, why: told.append((loaded, why)))
    settings = SourceSettings([Way(places.UnixPlace(str(ends.path)))], TOKEN, resume=False, patience=_WAIT)
    with pytest.raises(OperatorError, match=r"RAM has not arrived: .*No space left"):
        Source(settings, lambda visitor: visitor.sock.close(), ram).run()
    assert not told[0][0]
    wait_until(lambda: not ends.destination.status().connected, "the source has hung up")
