"""What Prometheus is told is what clients did."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import nbd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdserve.monitor import scraping
from tests.support.disks import KIB, MIB, random_disk
from tests.support.monitors import monitor
from tests.support.processes import check, run, wait_until
from tests.support.servers import NBDSERVE, Server, free_tcp_address, nbdserve
from tests.support.wire import Command, Wire, request

Samples = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Measured:
    """A server of the exports ``one`` and ``two`` that tells metrics."""

    server: Server
    port: int
    monitor: Path

    def scrape(self) -> Samples:
        """All samples by name and values of labels, the command first."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return {
            (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def when(self, sample: tuple[str, ...], value: float) -> Samples:
        """All samples, as soon as one of them has the value: a client is told before it is counted."""
        wait_until(lambda: self.scrape().get(sample) == value, f"{sample} is {value}")
        return self.scrape()


@pytest.fixture
def measured(tmp_path: Path) -> Iterator[Measured]:
    """A server that tells metrics, on a port that it chose itself."""
    random_disk(tmp_path / "one.img", 4 * MIB)
    random_disk(tmp_path / "two.img", MIB)
    path = tmp_path / "qmp.sock"
    exports = [f"--export={name}={tmp_path}/{name}.img,format=raw" for name in ("one", "two")]
    with nbdserve("--metrics=127.0.0.1:0", f"--qmp=unix:{path}", *exports, directory=tmp_path) as server:
        match = re.search(r"metrics on http://127\.0\.0\.1:(\d+)/metrics", server.process.output())
        assert match
        yield Measured(server, int(match[1]), path)


def work(server: Server) -> None:
    """What the expectations below count, over several connections."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.add_meta_context("base:allocation")
    client.connect_uri(server.uri("one"))
    client.pread(4096, 0)
    client.pread(3 * MIB, 0)
    client.pread(1000, 0, nbd.CMD_FLAG_DF)
    client.pwrite(b"x" * 512, 0)
    client.pwrite(b"x" * MIB, 0)
    client.pwrite(b"x" * 100, 0, nbd.CMD_FLAG_FUA)
    client.flush()
    client.trim(64 * KIB, 0)
    client.zero(32 * KIB, 0)
    client.cache(MIB, 0)
    client.block_status(2 * MIB, 0, lambda *_: 0)
    with pytest.raises(nbd.Error):
        client.pread(512, 4 * MIB)
    with pytest.raises(nbd.Error):
        client.pwrite(b"x", 4 * MIB)
    client.shutdown()


EXPECTED = {
    "read": (4, 4096 + 3 * MIB + 1000, 1),
    "write": (4, 512 + MIB + 100, 1),
    "flush": (1, 0, 0),
    "trim": (1, 64 * KIB, 0),
    "write_zeroes": (1, 32 * KIB, 0),
    "cache": (1, MIB, 0),
    "block_status": (1, 2 * MIB, 0),
}


def test_requests_bytes_errors_and_latencies_are_counted_by_command_and_export(measured: Measured) -> None:
    work(measured.server)
    work(measured.server)
    seen = measured.when(("nbdserve_connections", "one"), 0)
    for command, (requests, length, errors) in EXPECTED.items():
        assert seen["nbdserve_requests_total", command, "one"] == 2 * requests, command
        assert seen["nbdserve_bytes_total", command, "one"] == 2 * length, command
        assert seen["nbdserve_errors_total", command, "one"] == 2 * errors, command
        assert seen["nbdserve_request_duration_seconds_count", command, "one"] == 2 * requests, command
        assert seen["nbdserve_request_duration_seconds_bucket", command, "one", "+Inf"] == 2 * requests
        assert 0 < seen["nbdserve_request_duration_seconds_sum", command, "one"] < 60
        assert seen["nbdserve_requests_total", command, "two"] == 0
    buckets = [
        value for key, value in seen.items() if key[0].endswith("_bucket") and key[1:3] == ("read", "one")
    ]
    assert buckets == sorted(buckets)
    assert seen["nbdserve_accepted_connections_total",] == 2
    assert seen["nbdserve_export_size_bytes", "two"] == MIB
    assert seen["process_resident_memory_bytes",] > MIB


def test_connections_are_counted_while_they_last(measured: Measured) -> None:
    with Wire(measured.server.address) as first, Wire(measured.server.address) as second:
        first.go("two")
        first.send(request(Command.READ, 0, 512))
        first.receive(16 + 512)
        seen = measured.when(("nbdserve_handshakes",), 1)
        assert (seen["nbdserve_connections", "two"], seen["nbdserve_connections", "one"]) == (1, 0)
        assert seen["nbdserve_requests_total", "read", "two"] == 1, "counted while the client is connected"
        second.greet()
    seen = measured.when(("nbdserve_connections", "two"), 0)
    assert seen["nbdserve_requests_total", "read", "two"] == 1, "and after"


def test_many_reads_in_one_batch_are_all_counted(measured: Measured) -> None:
    with Wire(measured.server.address) as wire:
        wire.go("one")
        wire.send(*[request(Command.READ, 0, 512) for _ in range(1000)])
        wire.receive(1000 * (16 + 512))
        key = ("nbdserve_request_duration_seconds_count", "read", "one")
        seen = measured.when(key, 1000)
        assert seen["nbdserve_requests_total", "read", "one"] == 1000
        assert seen["nbdserve_bytes_total", "read", "one"] == 512_000


def test_an_export_that_is_removed_is_told_no_more(measured: Measured) -> None:
    work(measured.server)
    with monitor(measured.monitor) as qmp:
        qmp.execute("block-export-del", id_="one", mode="hard")
        qmp.event()
    assert not any("one" in key for key in measured.scrape())


def test_clients_that_are_turned_away_are_counted_by_reason(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    metrics, address = free_tcp_address(), free_tcp_address()
    options = ["-f", "raw", "--allow=192.0.2.0/24", f"--metrics={metrics.host}:{metrics.port}"]
    with nbdserve(*options, tmp_path / "disk.img", directory=tmp_path, at=address) as server:
        for _ in range(3):
            with Wire(address) as wire:
                assert wire.is_closed_by_server()
        seen = Measured(server, metrics.port, tmp_path).scrape()
        assert seen["nbdserve_refused_connections_total", "not allowed"] == 3
        assert seen["nbdserve_accepted_connections_total",] == 0


def test_scrapes_that_break_off_harm_nobody(measured: Measured) -> None:
    for sent in (
        b"",
        b"GET",
        b"GET /metrics HTTP/1.1\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", measured.port), 10) as connection:
            connection.sendall(sent)
    assert measured.scrape()
    measured.server.process.wait_for_line("serving 'one', 'two'")
    assert measured.server.process.output().count("\n") == 3, "nothing but what is served where"


def test_scrapes_are_answered_beside_hundreds_of_idle_connections(measured: Measured) -> None:
    tasks = Path(f"/proc/{measured.server.pid}/task")
    before = len(list(tasks.iterdir()))
    with ExitStack() as stack:
        # Where the listen queue is full the kernel tries again after a second.
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", measured.port), 0.9))
            for _ in range(300)
        ]
        assert measured.scrape()
        # The one that was served counts for a moment longer.
        wait_until(lambda: len(list(tasks.iterdir())) - before <= scraping.MOST_CLIENTS, "the first are gone")
        assert idle[0].recv(1) == b"", "those who came first are cut off"
        idle[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(12) == b"HTTP/1.0 200"
    assert measured.server.process.output().count("\n") == 3, "nothing but what is served where"


def test_a_client_has_its_time_to_scrape_and_no_more() -> None:
    server = scraping.HttpServer(socket.create_server(("127.0.0.1", 0)), seconds=0.3)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as idle:
            assert idle.recv(1) == b""
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as trickling:

            def is_cut_off() -> bool:
                try:
                    trickling.sendall(b"G")
                except OSError:
                    return True
                return False

            wait_until(is_cut_off, "a client that never falls silent is cut off as well", interval=0.05)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_metrics_port_in_use_is_named(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ["-f", "raw", "-k", str(tmp_path / "nbd.sock"), f"--metrics=127.0.0.1:{port}"]
        done = run(NBDSERVE, *options, tmp_path / "disk.img", seconds=10)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "nbd.sock").exists()


def test_metrics_are_told_over_ipv6_too(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    address = free_tcp_address("::1")
    options = ["-f", "raw", f"--metrics=[::1]:{address.port}"]
    with nbdserve(*options, tmp_path / "disk.img", directory=tmp_path):
        assert "nbdserve_requests_total" in check("curl", "-s", f"http://[::1]:{address.port}/metrics")
