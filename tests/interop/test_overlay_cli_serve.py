"""``nbd-overlay serve`` and the commands that talk to it, as an operator uses them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdserve.client import connect
from nbdserve.common.uri import NbdUri
from tests.support.disks import KIB, MIB, random_disk
from tests.support.overlays import end, make_overlay
from tests.support.processes import Argument, Process, is_alive, run, wait_until
from tests.support.servers import Server, free_tcp_address, fresh_path, nbdkit, nbdserve

PROGRAM = Path(sys.executable).with_name("nbd-overlay")
SIZE = 8 * MIB


@dataclass(frozen=True)
class Served:
    """An image that ``nbd-overlay serve`` serves, and the commands for it."""

    process: Process
    image: Path
    socket: Path
    qmp: Path

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.process.log

    def command(self, name: str, *arguments: Argument, stdin: str | None = None) -> CompletedProcess[str]:
        """A subcommand, run to its end."""
        return run(PROGRAM, name, "--qmp", f"unix:{self.qmp}", *arguments, seconds=60, stdin=stdin)

    def must(self, name: str, *arguments: Argument, stdin: str | None = None) -> str:
        """The output of a subcommand that must succeed."""
        done = self.command(name, *arguments, stdin=stdin)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def read(self, offset: int, length: int) -> bytes:
        """What a guest reads."""
        with connect(NbdUri(socket=str(self.socket))) as client:
            return client.read(offset, length)


@contextmanager
def served(image: Path, *options: Argument) -> Iterator[Served]:
    """``nbd-overlay serve``, ready, until the block ends; it must end well."""
    directory = image.parent
    sock, qmp = fresh_path(directory, "o", ".sock"), fresh_path(directory, "o", ".qmp")
    pid_file, log = fresh_path(directory, "o", ".pid"), fresh_path(directory, "serve", ".log")
    argv = [PROGRAM, "serve", image, "-k", sock, "--qmp", f"unix:{qmp}", "--pid-file", pid_file, *options]
    with Process(argv, log) as process:
        process.wait_for_pid_file(pid_file)
        yield Served(process, image, sock, qmp)
        if process.running:
            assert process.terminate() == 0, process.output()
        assert "Traceback" not in process.output(), process.output()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Server]:
    """A server with a disk of random bytes, ``base.img``."""
    random_disk(tmp_path / "base.img", SIZE)
    with nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path) as server:
        yield server


@pytest.fixture
def image(source: Server, tmp_path: Path) -> Path:
    """An empty flat image on top of it."""
    return make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())


def one_line(done: CompletedProcess[str], code: int) -> str:
    """The one line of an error."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("nbd-overlay: ")
    return done.stderr


def test_a_disk_is_streamed_and_is_a_raw_file_then(image: Path, tmp_path: Path) -> None:
    with served(image, "--stream") as daemon:
        lines = daemon.must("wait", "--timeout", "30").splitlines()
        assert lines[-1] == "100.0% of 8 MiB, complete"
        assert "100.0% of 8 MiB is here" in daemon.must("status")
        assert daemon.must("wait") == lines[-1] + "\n", "again, at once"
    assert image.read_bytes() == (tmp_path / "base.img").read_bytes()
    assert not Path(f"{image}.map").exists()


def test_streaming_is_started_slowed_paused_resumed_and_sped_up(image: Path) -> None:
    with served(image) as daemon:
        assert "not streaming" in daemon.must("status")
        daemon.must("stream", "--speed", "32K")
        told = json.loads(daemon.must("status", "--json"))
        assert (told["phase"], told["speed"], told["size"]) == ("running", 32 * KIB, SIZE)
        daemon.must("pause")
        paused = json.loads(daemon.must("status", "--json"))
        assert (paused["phase"], paused["rate"], paused["seconds-left"]) == ("paused", None, None)
        assert "Job is already paused" in one_line(daemon.command("pause"), 1)
        daemon.must("resume")
        assert "is busy" in one_line(daemon.command("stream"), 1)
        assert "running" in daemon.must("status")
        daemon.must("speed", "0")
        daemon.must("wait", "--timeout", "30")
        for name in ("pause", "resume", "speed"):
            done = daemon.command(name, *(["1M"] if name == "speed" else []))
            assert "everything is here: there is no job" in one_line(done, 1)
        daemon.must("stream")  # what is complete is complete at once


def test_the_time_left_is_that_which_a_known_rate_takes(image: Path) -> None:
    speed = 256 * KIB
    with served(image, "--stream", "--speed", str(speed)) as daemon:
        told: dict[str, Any] = {"seconds-left": None}

        def is_known() -> bool:
            told.update(json.loads(daemon.must("status", "--json")))
            return told["seconds-left"] is not None

        wait_until(is_known, "the time left is known", 10.0, 0.1)
        absent = told["size"] - told["local"]
        assert told["seconds-left"] == pytest.approx(absent / told["rate"], rel=0.3)
        assert 0 < told["rate"] <= 1.3 * speed


def test_what_the_source_is_needed_for_falls_to_nothing_when_it_may_go(image: Path) -> None:
    with served(image, "--stream", "--speed", "4M") as daemon:
        seen: list[int] = []

        def is_over() -> bool:
            told = json.loads(daemon.must("status", "--json"))
            seen.append(told["needed-bytes"])
            # What was needed a look ago cannot be less than what is absent now.
            assert min(seen[-2:-1], default=SIZE) >= told["size"] - told["local"]
            return bool(told["complete"])

        wait_until(is_over, "it is complete", 30.0, 0.05)
        assert seen == sorted(seen, reverse=True)
        assert any(0 < each <= SIZE for each in seen)
        assert seen[-1] == 0
        assert "needed   nothing of the source, which may be switched off" in daemon.must("status")


def test_wait_says_why_nothing_will_come(image: Path, source: Server) -> None:
    with served(image, "--reconnect-timeout", "0.2") as daemon:
        assert "start it with nbd-overlay stream" in one_line(daemon.command("wait"), 1)
        daemon.must("stream", "--speed", "100K")
        assert "after 0.3 s" in one_line(daemon.command("wait", "--timeout", "0.3"), 1)
        end(source)
        line = one_line(daemon.command("wait", "--timeout", "30"), 1)
        assert "streaming has stopped" in line
        assert "nbd-overlay resume tries again" in line
        assert "stopped: the backing is lost" in daemon.must("status")


def test_a_job_that_has_stopped_goes_on_when_the_source_is_back(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "base.img", SIZE)
    trigger = tmp_path / "fail"
    trigger.touch()
    options = ("--filter=error", "file", tmp_path / "base.img", "error-pread-rate=100%")
    with nbdkit(*options, f"error-pread-file={trigger}", directory=tmp_path) as source:
        image = make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())
        with served(image, "--stream") as daemon:
            assert "cannot be read" in one_line(daemon.command("wait", "--timeout", "30"), 1)
            trigger.unlink()
            daemon.must("resume")
            daemon.must("wait", "--timeout", "30")
    assert image.read_bytes() == content


def test_who_waits_hears_that_the_daemon_has_died(image: Path) -> None:
    with served(image, "--stream", "--speed", "100K") as daemon:
        argv: list[Argument] = [PROGRAM, "wait", "--qmp", f"unix:{daemon.qmp}"]
        with Process(argv, image.with_name("wait.log")) as waiting:
            waiting.wait_for_line("of 8 MiB")
            daemon.process.kill()
            assert waiting.wait() == 1
        assert "the daemon has ended before the whole disk was here" in waiting.output()
        assert "Traceback" not in waiting.output()
        assert "no monitor" in one_line(daemon.command("status"), 1)


@pytest.mark.exhaustive
def test_a_daemon_that_hangs_costs_no_more_than_the_time_limit(image: Path) -> None:
    with served(image) as daemon:
        daemon.process.freeze()
        try:
            line = one_line(daemon.command("status"), 1)
        finally:
            daemon.process.signal(signal.SIGCONT)
        assert "does not answer within 10 s" in line


def test_before_the_guest_is_here_nothing_is_kept_and_the_stream_waits(image: Path) -> None:
    with served(image, "--armed", "--stream") as daemon:
        daemon.read(0, MIB)
        told = json.loads(daemon.must("status", "--json"))
        assert (told["local"], told["armed"], told["phase"], told["window"]) == (0, True, "idle", None)
        assert "not here yet (armed), streams when it is" in daemon.must("status")
        assert "overlay-activate first" in one_line(daemon.command("stream"), 1)
        assert "after 0.3 s" in one_line(daemon.command("wait", "--timeout", "0.3"), 1)
        daemon.must("activate")
        daemon.must("wait", "--timeout", "30")
        assert json.loads(daemon.must("status", "--json"))["window"] > 0


def test_what_the_guest_changed_at_the_source_is_forgotten(image: Path) -> None:
    with served(image) as daemon:
        daemon.read(0, SIZE)
        daemon.must("invalidate", "1M", "64K")
        assert json.loads(daemon.must("status", "--json"))["local"] == SIZE - 64 * KIB
        daemon.must("invalidate", "--ranges", "-", stdin="# dirty\n0 4096\n\n2M 1M # more\n")
        assert json.loads(daemon.must("status", "--json"))["local"] == SIZE - MIB - 68 * KIB
        assert "not within the disk" in one_line(daemon.command("invalidate", "8M", "1"), 1)
        line = one_line(daemon.command("invalidate", "--ranges", "-", stdin="0 4096\n0\n"), 2)
        assert "standard input, line 2: write OFFSET LENGTH" in line
        daemon.must("activate")
        assert "the guest runs here" in one_line(daemon.command("invalidate", "0", "4K"), 1)


@pytest.mark.parametrize("complete", [False, True])
def test_quit_does_not_take_the_disk_from_a_guest_unless_it_is_forced(image: Path, complete: bool) -> None:
    with served(image) as daemon:
        if complete:
            daemon.must("stream")
            daemon.must("wait", "--timeout", "30")
        with connect(NbdUri(socket=str(daemon.socket))) as guest:
            line = one_line(daemon.command("quit"), 1)
            assert "quit is refused: a guest uses the disk (clients: 1)" in line
            assert ("not all of the disk is here" in line) == (not complete)
            assert "force" in line
            assert len(guest.read(0, 4 * KIB)) == 4 * KIB
            daemon.must("quit", "--force")
            assert daemon.process.wait() == 0, daemon.process.output()


@pytest.mark.parametrize("complete", [False, True])
def test_quit_ends_a_daemon_that_no_guest_uses(image: Path, complete: bool) -> None:
    with served(image) as daemon:
        if complete:
            daemon.must("stream")
            daemon.must("wait", "--timeout", "30")
        # One that has just gone is no guest any more, whatever is still to be done for it.
        daemon.read(0, 4 * KIB)
        daemon.must("quit")
        assert daemon.process.wait() == 0, daemon.process.output()
    assert not daemon.socket.exists()


def test_in_the_background_it_is_ready_when_the_command_returns(image: Path, tmp_path: Path) -> None:
    sock, qmp, pid_file = tmp_path / "o.sock", tmp_path / "o.qmp", tmp_path / "o.pid"
    options: list[Argument] = ["-k", sock, "--qmp", f"unix:{qmp}", "--pid-file", pid_file, "--daemonize"]
    done = run(PROGRAM, "serve", image, *options, seconds=20)
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    try:
        with connect(NbdUri(socket=str(sock))) as client:
            assert client.size == SIZE
        assert run(PROGRAM, "status", "--qmp", f"unix:{qmp}").returncode == 0
        again = run(PROGRAM, "serve", image, "-k", tmp_path / "other.sock", "--daemonize", seconds=20)
        assert "lock" in one_line(again, 1) or "use" in again.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid), "the daemon has ended")
    assert not any(path.exists() for path in (sock, qmp, pid_file))


def test_metrics_tell_what_was_copied_and_how_long_guests_waited(image: Path, source: Server) -> None:
    address = free_tcp_address()
    with served(image, "--metrics", f"{address.host}:{address.port}") as daemon:
        for place in range(4):
            daemon.read(place * MIB, 4 * KIB)
        daemon.must("stream")
        daemon.must("wait", "--timeout", "30")
        with urllib.request.urlopen(f"http://{address.host}:{address.port}/metrics", timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    seen = {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for each in families
        for sample in each.samples
    }
    assert seen["nbd_overlay_copied_bytes_total",] == SIZE
    fetched, streamed = seen["nbd_overlay_fetched_bytes_total",], seen["nbd_overlay_streamed_bytes_total",]
    assert fetched >= 4 * 4 * KIB
    assert fetched + streamed == SIZE
    assert seen["nbd_overlay_misses_total",] == 4
    assert seen["nbd_overlay_miss_seconds_count",] == seen["nbd_overlay_miss_seconds_bucket", "+Inf"] == 4
    assert 0 < seen["nbd_overlay_miss_seconds_sum",] < 400
    assert seen["nbd_overlay_local_bytes",] == seen["nbd_overlay_size_bytes",] == SIZE
    assert (seen["nbd_overlay_phase", "done"], seen["nbd_overlay_phase", "running"]) == (1, 0)
    assert seen["nbd_overlay_source_errors_total", source.uri()] == 0
    assert seen["nbdserve_requests_total", "read", ""] == 4


def test_all_options_that_make_no_sense_are_refused_in_a_line(image: Path, tmp_path: Path) -> None:
    sock = str(tmp_path / "o.sock")
    for options, wanted in {
        (): "-k/--socket",
        ("-k", sock, "--speed", "fast"): "--speed 'fast' is not a size",
        ("-k", sock, "--connections", "0"): "--connections",
        ("-k", sock, "--connections", "1000"): "64 are the most",
        ("-k", sock, "--reconnect-timeout", "-1"): "--reconnect-timeout",
        ("-k", sock, "--qmp", "tcp:1"): "write unix:PATH",
        ("-k", sock, "--qmp", f"unix:{sock}"): "the same file as --socket",
        ("-k", sock, "--metrics", "9100"): "write HOST:PORT",
        ("-k", sock, "--backing", "http://host/"): "http://host/",
        ("-k", sock, "--backing", "nbd://a", "--backing", "nbd://a"): "named twice",
        ("-k", sock, "--pid-file", str(tmp_path / "none" / "pid")): "there is no directory",
        ("-k", str(image)): "the same file as IMAGE",
        ("-k", "x" * 200): "bytes",
    }.items():
        line = one_line(run(PROGRAM, "serve", image, *options, seconds=20), 2)
        assert wanted in line, options
        assert not Path(sock).exists()
    missing = run(PROGRAM, "serve", tmp_path / "none", "-k", sock)
    assert "there is no such file" in one_line(missing, 1)


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("status", "--qmp", "/path"),
        ("speed", "--qmp", "unix:x"),
        ("speed", "fast", "--qmp", "unix:x"),
        ("stream", "--speed", "-1", "--qmp", "unix:x"),
        ("wait", "--timeout", "0", "--qmp", "unix:x"),
        ("invalidate", "--qmp", "unix:x"),
        ("invalidate", "0", "--qmp", "unix:x"),
        ("invalidate", "0", "1", "--ranges", "-", "--qmp", "unix:x"),
    ],
)
def test_a_command_that_is_used_wrongly_says_so_in_a_line(words: tuple[str, ...]) -> None:
    one_line(run(PROGRAM, *words), 2)


def test_a_monitor_of_something_else_is_no_daemon(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        other.close()
        assert "no monitor" in one_line(run(PROGRAM, "status", "--qmp", f"unix:{path}"), 1)


def test_a_guest_that_writes_what_looks_like_an_image_gets_it_back_as_it_is(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", "qed", "-u", "-F", "raw", "-b", "nbd://127.0.0.1/", disk, str(SIZE))
    written = disk.read_bytes()
    with served(disk, "--layout", "flat") as daemon:
        assert daemon.read(0, len(written)) == written
