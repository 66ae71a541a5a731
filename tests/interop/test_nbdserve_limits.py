"""Floods: what one client, or many, can make the server hold is bounded, and honest clients are served."""

from __future__ import annotations

import functools
import gc
import re
import resource
import socket
import struct
import threading
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdserve.connection.client_connection import Connection
from nbdserve.connection.policy import Policy
from tests.support.activation import activated
from tests.support.disks import KIB, MIB, random_disk
from tests.support.inprocess import GatedBackend, one_export, running
from tests.support.memory import MemoryBackend
from tests.support.processes import check, wait_until
from tests.support.servers import TcpAddress, free_tcp_address, nbdserve
from tests.support.wire import Command, Option, Reply, Wire, export_query, request


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


def test_idle_handshakes_do_not_keep_honest_clients_out(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--max-handshakes=6", image, directory=tmp_path) as server:
        flood: list[socket.socket] = []
        for _ in range(2):
            flood += [server.connect() for _ in range(12)]
            assert check("nbdinfo", "--size", server.uri(), seconds=10) == f"{MIB}\n"
            threads = len(list(Path(f"/proc/{server.pid}/task").iterdir()))
            assert threads <= 1 + 6 + 1
        assert server.process.output().count("slow to choose an export") > 10
        for connection in flood:
            connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9"])
@pytest.mark.exhaustive
def test_a_flood_of_clients_that_say_nothing_keeps_honest_ones_out_for_seconds_at_most(
    image: Path, tmp_path: Path, host: str
) -> None:
    """4,000 of them, from the honest client's own host or from another one, all before it in the queue.

    If each had the second that those have who answer, 32 at a time, it would take 125 s, and takes 13 s.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    address = free_tcp_address()
    argv = ["-f", "raw", "--max-handshakes=32", str(image)]
    with nbdserve(*argv, directory=tmp_path, at=address) as server, ExitStack() as flood:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            for _ in range(4000):
                silent = flood.enter_context(socket.socket())
                silent.bind((host, 0))
                silent.setblocking(False)
                silent.connect_ex((address.host, address.port))
            begun = time.monotonic()
            assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
            assert time.monotonic() - begun < 100
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_answers_the_greeting_stays_when_those_who_do_not_have_to_go(image: Path, tmp_path: Path) -> None:
    address = free_tcp_address()
    with (
        nbdserve("-f", "raw", "--max-handshakes=4", image, directory=tmp_path, at=address) as server,
        Wire(address) as patient,
        ExitStack() as flood,
    ):
        patient.greet()
        for _ in range(12):
            flood.enter_context(server.connect())
        wait_until(lambda: server.log.read_text().count("slow to choose") >= 9, "the silent ones go", 5)
        assert patient.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def test_hosts_that_many_clients_come_from_give_way_first(image: Path, tmp_path: Path) -> None:
    address = free_tcp_address()
    with (
        nbdserve("-f", "raw", "--max-handshakes=4", image, directory=tmp_path, at=address) as server,
        Wire(address) as lonely,
        ExitStack() as flood,
    ):
        lonely.receive(18)
        for _ in range(8):
            many = flood.enter_context(socket.socket())
            many.bind(("127.0.0.9", 0))
            many.connect((address.host, address.port))
        wait_until(lambda: server.log.read_text().count("slow to choose") >= 5, "room for the last ones", 5)
        cut = re.findall(r"nbdserve: (\S+):\d+: cut off", server.log.read_text())
        assert set(cut) == {"127.0.0.9"}
        lonely.send(struct.pack(">I", 3))
        assert lonely.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def test_clients_that_have_chosen_do_not_count_as_handshakes(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--max-handshakes=1", image, directory=tmp_path) as server:
        wires = [Wire(server.address) for _ in range(1)]
        for _ in range(20):
            wires[-1].go()
            wires.append(Wire(server.address))
        for wire in wires[:-1]:
            wire.send(request(Command.READ, 0, 512))
            assert wire.simple_reply().error == 0
            wire.socket.close()


def test_only_addresses_that_are_allowed_are_served(image: Path, tmp_path: Path) -> None:
    tcp, six = free_tcp_address(), free_tcp_address("::1")
    listen = [f"--listen=nbd://127.0.0.1:{tcp.port}", f"--listen=nbd://[::1]:{six.port}"]
    with nbdserve(
        "-f", "raw", "--allow=127.0.0.2", "--allow=::1/128", *listen, image, directory=tmp_path
    ) as s:
        assert check("nbdinfo", "--size", s.uri()) == f"{MIB}\n"
        assert check("nbdinfo", "--size", six.uri()) == f"{MIB}\n"
        with Wire(tcp) as refused:
            assert refused.is_closed_by_server()
        lines = [line for line in s.process.output().splitlines() if "--allow" in line]
        assert len(lines) == 1
        assert lines[0].startswith("nbdserve: 127.0.0.1:")
        with socket.socket() as other:
            other.settimeout(60)
            other.bind(("127.0.0.2", 0))
            other.connect((tcp.host, tcp.port))
            assert len(other.recv(18, socket.MSG_WAITALL)) == 18


def test_an_ipv4_client_of_a_socket_for_both_kinds_is_known_by_its_ipv4_address(
    image: Path, tmp_path: Path
) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        address = TcpAddress("127.0.0.1", both.getsockname()[1])
        for network, served in (("127.0.0.0/8", True), ("::/0", False)):
            with activated(["-f", "raw", f"--allow={network}", image], tmp_path, both), Wire(address) as wire:
                assert wire.is_closed_by_server() != served


def test_the_memory_of_requests_that_wait_is_bounded_over_all_clients(tmp_path: Path) -> None:
    disk = GatedBackend(16 * MIB, local=False, slow=b"")
    policy = Policy(request_memory=MIB)
    size = 300 * KIB
    with running(one_export(disk), tmp_path, policy) as (server, address):
        wires = [Wire(address) for _ in range(4)]
        senders = []
        for number, wire in enumerate(wires):
            wire.go()
            data = b"".join(
                request(Command.WRITE, (4 * number + index) * MIB, cookie=index, data=b"x" * size)
                for index in range(4)
            )
            senders.append(threading.Thread(target=wire.send, args=(data,)))
            senders[-1].start()
        wait_until(lambda: disk.waiting == 3, "three of sixteen requests fit into the memory")
        assert server.memory.held <= MIB
        disk.gate.set()
        for wire, sender in zip(wires, senders, strict=True):
            assert sorted(wire.simple_reply().cookie for _ in range(4)) == [0, 1, 2, 3]
            sender.join()
            wire.socket.close()
        wait_until(lambda: server.memory.held == 0, "all memory is given back")
    assert disk.content == (b"x" * size).ljust(MIB, b"\0") * 16


def test_a_client_that_leaves_a_payload_half_sent_gives_its_memory_back(tmp_path: Path) -> None:
    disk = GatedBackend(16 * MIB, local=False, slow=b"")
    disk.gate.set()
    with running(one_export(disk), tmp_path, Policy(request_memory=MIB)) as (server, address):
        with Wire(address) as wire:
            wire.go()
            wire.send(request(Command.WRITE, 0, data=b"x" * MIB)[:-1])
            wait_until(lambda: server.memory.held, "the payload's memory is reserved")
        wait_until(lambda: server.memory.held == 0, "it is given back")
        with Wire(address) as wire:
            wire.go()
            wire.send(request(Command.WRITE, 0, data=b"y" * 2 * MIB))
            assert wire.simple_reply().error == 0, "one request may need more than all memory"


def resident(pid: int) -> int:
    """The memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * KIB


def test_a_thousand_idle_clients_are_held_in_little_memory(image: Path, tmp_path: Path) -> None:
    clients = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with nbdserve("-f", "raw", "--handshake-timeout=120", image, directory=tmp_path) as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            with Wire(server.address) as first:
                first.go()
                alone = resident(server.pid)
                wires = []
                for _ in range(clients):
                    # Only so many may be silent at a time.
                    wires.append(Wire(server.address))
                    wires[-1].go()
                assert alone < 40 * MIB
                assert resident(server.pid) - alone < clients * 128 * KIB
                for wire in (first, wires[0], wires[-1]):
                    wire.send(request(Command.READ, 0, 512))
                    assert wire.simple_reply().error == 0
                for wire in wires:
                    wire.socket.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_dead(reference: weakref.ref[Connection]) -> bool:
    return reference() is None


def test_a_client_that_breaks_off_leaves_no_buffers_behind(tmp_path: Path) -> None:
    """They must not wait for the collector of cyclic garbage: half a megabyte each way for every client."""
    memory = MemoryBackend(16 * MIB)
    gc.disable()
    try:
        with running(one_export(memory), tmp_path) as (server, address):
            for sent in (b"", b"half", b"x" * 28, request(Command.READ, 0, MIB) * 20):
                with Wire(address) as wire:
                    wire.go(structured=True)
                    wire.send(sent)
                    (connection,) = server.clients.everyone()
                    kept = weakref.ref(connection)
                    del connection
                wait_until(lambda: not server.clients, "the client has gone")
                wait_until(functools.partial(_is_dead, kept), f"its buffers too, after {sent[:9]!r}", 2)
    finally:
        gc.enable()


EXTENDED_HEADERS = 11
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_MAGIC = 0x21E41C71
PAYLOAD_LEN = 32
ERROR_CHUNK = 0x8001


def test_a_block_status_request_with_a_long_payload_is_refused_in_step(image: Path, tmp_path: Path) -> None:
    length = 8 * MIB
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(EXTENDED_HEADERS)[-1].kind == Reply.ACK
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        wire.send(EXTENDED_REQUEST.pack(EXTENDED_MAGIC, PAYLOAD_LEN, Command.BLOCK_STATUS, 1, 0, length))
        wire.send(bytes(length), EXTENDED_REQUEST.pack(EXTENDED_MAGIC, 0, Command.FLUSH, 2, 0, 0))
        _, _, kind, cookie, _, size = EXTENDED_CHUNK.unpack(wire.receive(EXTENDED_CHUNK.size))
        assert (kind, cookie) == (ERROR_CHUNK, 1)
        wire.receive(size)
        assert EXTENDED_CHUNK.unpack(wire.receive(EXTENDED_CHUNK.size))[2:4] == (0, 2)
        peak = Path(f"/proc/{server.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        assert int(peak) < 40 * KIB, "in KiB: the payload was not kept"


def test_clients_that_take_no_replies_do_not_hold_the_workers(tmp_path: Path) -> None:
    disk = GatedBackend(16 * MIB, local=False)
    with running(one_export(disk), tmp_path) as (_, address):
        deaf = [Wire(address) for _ in range(4)]
        for wire in deaf:
            wire.go()
            wire.send(*[request(Command.READ, 0, 256 * KIB, cookie=index) for index in range(100)])
            wire.socket.recv(1, socket.MSG_PEEK)
        with Wire(address, 5) as other:
            other.go(structured=True)
            for index in range(20):
                other.send(request(Command.READ, 0, 1000, cookie=index))
                assert other.chunk().cookie == index
        for wire in deaf:
            got = set()
            for _ in range(100):
                got.add(wire.simple_reply().cookie)
                wire.receive(256 * KIB)
            assert got == set(range(100)), "late, but all of them"
            wire.socket.close()


def test_a_client_that_leaves_with_replies_untaken_lets_the_server_end(tmp_path: Path) -> None:
    disk = GatedBackend(16 * MIB, local=False)
    with running(one_export(disk), tmp_path) as (server, address):
        with Wire(address) as wire:
            wire.go()
            wire.send(*[request(Command.READ, 0, 256 * KIB, cookie=index) for index in range(100)])
            wire.socket.recv(1, socket.MSG_PEEK)
        wait_until(lambda: len(server.clients) == 0, "the connection has ended")
        assert server.memory.held == 0
