"""How nbdserve starts, whom it lets in, and how it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_disk
from tests.support.processes import Process, check, is_alive, run, wait_until
from tests.support.servers import NBDSERVE, Server, UnixAddress, free_tcp_address, nbdserve
from tests.support.wire import Command, Option, Reply, Wire, export_query, option, request


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


def test_it_serves_again_and_again_until_it_is_told_to_stop(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        for _ in range(3):
            assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
        assert server.process.terminate() == 0


def test_once_ends_with_the_last_client(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--once", image, directory=tmp_path) as server:
        with Wire(server.address) as first, Wire(server.address) as second:
            first.go()
            second.go()
            first.send(request(Command.DISC))
            assert first.is_closed_by_server()
            second.send(request(Command.READ, length=512))
            second.receive(16 + 512)
            assert server.process.running
        assert server.process.wait() == 0


def test_once_is_not_ended_by_a_client_that_chose_no_export(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--once", image, directory=tmp_path) as server:
        server.connect().close()
        with Wire(server.address) as asking:
            asking.greet()
            assert asking.haggle(Option.INFO, export_query(""))[-1].kind == Reply.ACK
        check("nbdcopy", server.uri(), "null:")
        assert server.process.wait() == 0


def test_a_goodbye_whose_answer_nobody_waits_for_is_not_told_as_a_loss(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        for _ in range(20):
            with Wire(server.address) as wire:
                wire.greet()
                wire.send(option(Option.ABORT))
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
        assert server.process.terminate() == 0
        assert "connection lost" not in server.process.output()


def test_shared_lets_the_next_client_in_when_one_goes(image: Path, tmp_path: Path) -> None:
    with (
        nbdserve("-f", "raw", "--shared=2", image, directory=tmp_path) as server,
        Wire(server.address) as first,
        Wire(server.address) as second,
        Wire(server.address, 0.3) as third,
    ):
        first.go()
        second.go()
        with pytest.raises(TimeoutError):
            third.receive(1)
        first.send(request(Command.DISC))
        first.socket.close()
        third.socket.settimeout(60)
        third.go()


def test_max_connections_turns_further_clients_away_at_once(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "--max-connections=2", image, directory=tmp_path) as server:
        with Wire(server.address) as first, Wire(server.address) as second:
            first.go()
            second.go()
            with Wire(server.address) as third:
                assert third.is_closed_by_server()
            first.send(request(Command.DISC))
            assert first.is_closed_by_server()

        def is_let_in() -> bool:
            return run("nbdinfo", "--size", server.uri()).returncode == 0

        wait_until(is_let_in, "there is room again")


def test_the_pid_file_holds_the_servers_id_and_goes_with_it(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        assert server.pid == server.process.pid
        assert isinstance(server.address, UnixAddress)
        assert server.address.path.stat().st_mode & 0o777 == 0o600
        assert server.process.terminate() == 0
        assert not server.address.path.exists()
        assert not list(tmp_path.glob("*.pid"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_usual_signals_end_it_in_good_order(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as idle:
        idle.go()
        server.process.signal(number)
        assert server.process.wait() == 0
        assert idle.is_closed_by_server()


def test_a_signal_ends_it_whatever_its_main_thread_was_about_to_do(image: Path, tmp_path: Path) -> None:
    """A signal that another thread takes stands for one that comes just before the main thread waits."""
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as idle:
        idle.go()
        threads = [int(task.name) for task in Path(f"/proc/{server.pid}/task").iterdir()]
        other = max(threads)
        assert other != server.pid
        assert ctypes.CDLL(None).tgkill(server.pid, other, signal.SIGTERM) == 0
        assert server.process.wait() == 0


def test_fork_returns_when_the_daemon_is_ready(image: Path, tmp_path: Path) -> None:
    address, pid_file = UnixAddress(tmp_path / "nbd.sock"), tmp_path / "nbd.pid"
    started = run(
        NBDSERVE, "-f", "raw", "-k", address.path, "--pid-file", pid_file, "--fork", image, seconds=20
    )
    pid = int(pid_file.read_text())
    try:
        assert started.returncode == 0, started.stderr
        check("nbdcopy", address.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()
        assert os.getsid(pid) != os.getsid(0)
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the daemon has ended")
    assert not pid_file.exists()
    assert not address.path.exists()


def test_fork_reports_what_is_wrong_before_it_returns(tmp_path: Path) -> None:
    started = run(
        NBDSERVE, "-f", "raw", "-k", tmp_path / "nbd.sock", "--fork", tmp_path / "none.img", seconds=20
    )
    assert started.returncode == 1
    assert "none.img" in started.stderr


def test_it_listens_on_several_addresses_at_once(image: Path, tmp_path: Path) -> None:
    four, six = free_tcp_address(), free_tcp_address("::1")
    listen = [f"--listen=nbd://127.0.0.1:{four.port}", f"--listen=nbd://[::1]:{six.port}"]
    with nbdserve("-f", "raw", *listen, image, directory=tmp_path) as server:
        for address in (server.address, four, six):
            assert check("nbdinfo", "--size", address.uri()) == f"{MIB}\n"


def test_without_a_bind_address_both_kinds_of_ip_are_served(image: Path, tmp_path: Path) -> None:
    port = str(free_tcp_address().port)
    pid_file = tmp_path / "nbd.pid"
    with Process(
        [NBDSERVE, "-f", "raw", "-p", port, "--pid-file", pid_file, image], tmp_path / "nbdserve.log"
    ) as process:
        process.wait_for_pid_file(pid_file)
        for host in ("127.0.0.1", "[::1]"):
            assert check("nbdinfo", "--size", f"nbd://{host}:{port}/") == f"{MIB}\n"


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(image: Path, tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "nbd.sock")
    with nbdserve("-f", "raw", image, directory=tmp_path, at=address) as first:
        refused = run(NBDSERVE, "-f", "raw", "-r", "-k", address.path, image, seconds=20)
        assert refused.returncode == 1
        assert str(address.path) in refused.stderr
        assert check("nbdinfo", "--size", address.uri()) == f"{MIB}\n"
        first.process.kill()
    assert address.path.exists()
    with nbdserve("-f", "raw", image, directory=tmp_path, at=address):
        assert check("nbdinfo", "--size", address.uri()) == f"{MIB}\n"


READS, READ_SIZE = 64, 256 * KIB


def _stop_while_reads_are_in_flight(server: Server, wire: Wire) -> None:
    """Ask for more than the sockets can hold, and stop the server when it is stuck in the middle of it."""
    wire.send(*[request(Command.READ, index * 4 * KIB, READ_SIZE, cookie=index) for index in range(READS)])
    wire.socket.recv(1, socket.MSG_PEEK)
    server.process.signal(signal.SIGTERM)


@pytest.mark.parametrize("place", ["unix", "tcp"])
def test_sigterm_lets_reads_in_flight_be_answered(image: Path, tmp_path: Path, place: str) -> None:
    content = image.read_bytes()
    at = free_tcp_address() if place == "tcp" else None
    with nbdserve("-f", "raw", image, directory=tmp_path, at=at) as server, Wire(server.address) as wire:
        wire.go()
        _stop_while_reads_are_in_flight(server, wire)
        for index in range(READS):
            reply = wire.simple_reply()
            assert (reply.cookie, reply.error) == (index, 0)
            offset = index * 4 * KIB
            assert wire.receive(READ_SIZE) == content[offset : offset + READ_SIZE]
        assert wire.is_closed_by_server()
        assert server.process.wait() == 0


def test_sigterm_lets_writes_in_flight_be_answered(image: Path, tmp_path: Path) -> None:
    blocks = [bytes([index]) * 4096 for index in range(128)]
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        sent = threading.Event()

        def write_all() -> None:
            for index, block in enumerate(blocks):
                wire.send(request(Command.WRITE, index * 4096, cookie=index, data=block))
            sent.set()

        writer = threading.Thread(target=write_all)
        writer.start()
        assert sent.wait(60), "what the sockets hold is less than the test thinks"
        writer.join()
        server.process.signal(signal.SIGTERM)
        assert [wire.simple_reply().cookie for _ in blocks] == list(range(len(blocks)))
        assert wire.is_closed_by_server()
        assert server.process.wait() == 0
    assert image.read_bytes()[: 128 * 4096] == b"".join(blocks)


def test_a_client_that_never_stops_cannot_keep_the_server_from_ending(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        job = ["--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=60"]
        command = ["fio", "--name=busy", "--ioengine=nbd", f"--uri={server.uri()}", *job]
        with Process(command, tmp_path / "fio.log") as client:
            client.wait_for(lambda: _bytes_read_by(server.pid) > 10 * MIB, "fio reads")
            assert server.process.terminate(seconds=10) == 0
            assert client.wait(10) != 0


def _bytes_read_by(pid: int) -> int:
    """What a process has read from files and sockets, in bytes."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.exhaustive
def test_a_client_that_takes_no_replies_cannot_keep_the_server_from_ending(
    image: Path, tmp_path: Path
) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        _stop_while_reads_are_in_flight(server, wire)
        assert server.process.wait(seconds=30) == 0
