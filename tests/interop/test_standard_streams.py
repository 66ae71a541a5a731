"""Commands whose standard streams are closed, full, or read by nobody: no traceback, the right code."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from tests.support.disks import random_disk
from tests.support.processes import run, wait_until
from tests.support.servers import NBDSERVE, UnixAddress, nbdserve
from tests.unit.recipes.plans.test_plan import MINIMAL

BIN = NBDSERVE.parent
CLOSED = [
    " ".join(words) for count in (1, 2, 3) for words in itertools.combinations(("<&-", ">&-", "2>&-"), count)
]
"""What a shell is told, to start a command without some of its standard streams."""


@dataclass(frozen=True)
class Case:
    """A command, its exit code where all is well, and whether it has something to say on standard output."""

    words: str
    code: int
    prints: bool = False


CASES = [
    Case("nbdserve --help", 0, True),
    Case("nbdserve --version", 0, True),
    Case("nbdserve --nonsense", 2),
    Case("nbdserve no.raw", 1),
    Case("nbd-overlay --help", 0, True),
    Case("nbd-overlay create --backing '{uri}' --force new.raw", 0, True),
    Case("nbd-overlay create --backing '{uri}' b.raw", 1),
    Case("nbd-overlay info b.raw", 0, True),
    Case("nbd-overlay check b.raw", 0, True),
    Case("nbd-overlay map --json b.raw", 0, True),
    Case("nbd-overlay verify b.raw", 0, True),
    Case("nbd-overlay status --qmp unix:no.qmp", 1),
    Case("nbd-overlay serve b.raw", 2),
    Case("nbd-migrate --help", 0, True),
    Case("nbd-migrate run --check plan.toml", 0, True),
    Case("nbd-migrate run plan.toml", 1),
    Case("nbd-migrate run --json plan.toml", 1),
    Case("nbd-migrate run no.toml", 1),
    Case("nbd-migrate finish --help", 0, True),
    Case("nbd-migrate finish plan.toml", 1),
    Case("nbd-migrate finish --boot no.toml", 1),
    Case("nbd-migrate qmp {here}/no.qmp query-status", 1),
    Case("nbd-migrate pivot --qmp {here}/no.qmp b.raw", 1),
    Case("nbd-migrate probe '{uri}'", 0, True),
    Case("nbd-migrate probe nbd+unix:///?socket=no", 1),
    Case("nbd-migrate fence ready no.raw", 1),
    Case("nbd-migrate demo --size nonsense", 2),
]


SUPERVISORS = [
    ("nbd-migrate supervisor supervisor.log '' true", 0),
    ("nbd-migrate supervisor supervisor.log '' ./no", 1),
]
"""These say nothing on standard error, and go on without whoever should hear them."""


@dataclass(frozen=True)
class Place:
    """A directory with a plan, an overlay, and a server of what that is over."""

    directory: Path
    uri: str

    def run(self, words: str, redirected: str) -> CompletedProcess[str]:
        """Run a command with redirected streams, and return what it wrote where it was not."""
        line = f"{words.format(uri=self.uri, here=self.directory)} {redirected}"
        script = ["bash", "-c", line]
        return run(*script, cwd=self.directory, env={"PATH": f"{BIN}:{os.environ['PATH']}"}, stdin="")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Nothing that runs there changes it."""
    directory = tmp_path_factory.mktemp("streams")
    plan = MINIMAL.replace('qmp = "/', f'qmp = "{directory}/no/')
    (directory / "plan.toml").write_text(plan)
    random_disk(directory / "disk.raw", 1 << 20)
    with nbdserve("-r", "-f", "raw", directory / "disk.raw", directory=directory) as server:
        made = Place(directory, server.uri())
        done = made.run("nbd-overlay create --backing '{uri}' b.raw", "")
        assert done.returncode == 0, done.stderr
        yield made


@pytest.mark.parametrize("redirected", [*CLOSED, ">/dev/full", "| true", "2>/dev/full"])
@pytest.mark.sampled(3)
def test_a_supervisor_needs_nobody_to_hear_it(place: Place, redirected: str) -> None:
    for words, code in SUPERVISORS:
        done = place.run(f"set -o pipefail; {words}", redirected)
        assert (done.returncode, done.stderr) == (code, ""), f"{words} {redirected}: {done}"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.sampled(1)
def test_closed_streams_change_nothing_but_what_is_seen(place: Place, closed: str) -> None:
    for case in CASES:
        done = place.run(case.words, closed)
        assert done.returncode == case.code, f"{case} {closed}: {done}"
        assert "Traceback" not in done.stderr, f"{case} {closed}: {done}"
        assert len(done.stderr.splitlines()) == (case.code != 0 and "2>&-" not in closed), f"{case}: {done}"
        assert bool(done.stdout) == (case.prints and ">&-" not in closed.split()), f"{case} {closed}: {done}"


def test_output_that_cannot_be_written_is_a_failure_with_a_line(place: Place) -> None:
    for case in CASES:
        done = place.run(case.words, ">/dev/full")
        assert done.returncode == (case.code or int(case.prints)), f"{case}: {done}"
        lines = done.stderr.splitlines()
        if case.prints:
            program = case.words.split()[0]
            assert lines == [f"{program}: standard output: No space left on device"], f"{case}: {done}"
        else:
            assert len(lines) == (case.code != 0), f"{case}: {done}"


@pytest.mark.exhaustive
def test_a_reader_that_goes_is_no_news(place: Place) -> None:
    for case in CASES:
        done = place.run(f"set -o pipefail; {case.words}", "| true")
        # Whoever is quick has written it all before.
        assert done.returncode in {case.code, case.code or int(case.prints)}, f"{case}: {done}"
        assert len(done.stderr.splitlines()) == (case.code != 0), f"{case}: {done}"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("redirected", ["2>/dev/full", ">/dev/full 2>&1", "2>/dev/full >&-"])
@pytest.mark.exhaustive
def test_errors_that_cannot_be_told_leave_the_exit_code(place: Place, redirected: str) -> None:
    for case in CASES:
        done = place.run(case.words, redirected)
        full = case.prints and redirected == ">/dev/full 2>&1"
        assert done.returncode == (case.code or int(full)), f"{case} {redirected}: {done}"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("closed", ["", *CLOSED, "2>/dev/full", ">/dev/full"])
@pytest.mark.parametrize(
    "words", ["nbdserve --fork -r -f raw disk.raw", "nbd-overlay serve --daemonize b.raw"]
)
@pytest.mark.sampled(2)
def test_a_daemon_serves_whatever_its_streams_are(
    place: Place, tmp_path: Path, words: str, closed: str
) -> None:
    done = place.run(f"{words} -k {tmp_path}/socket --pid-file {tmp_path}/pid", closed)
    assert (done.returncode, done.stdout) == (0, ""), done
    with daemon(tmp_path / "pid"):
        assert len(done.stderr.splitlines()) == ("2>" not in closed), done
        greet(tmp_path / "socket")


@pytest.mark.parametrize("closed", ["", *CLOSED, "2>/dev/full", ">/dev/full"])
def test_a_server_in_the_foreground_ends_in_good_order_whatever_its_streams_are(
    place: Place, tmp_path: Path, closed: str
) -> None:
    pid = tmp_path / "pid"
    served = f"nbdserve -v -r -f raw disk.raw -k {tmp_path}/socket --pid-file {pid}"
    told = f"until [ -s {pid} ]; do sleep 0.1; done; kill $(cat {pid}); wait $!"
    done = place.run(f"{served} {closed} & {told}", "")
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr


def test_a_client_on_closed_streams_is_refused_in_one_line(place: Place) -> None:
    for closed in ("<&-", ">&-", "<&- >&-"):
        done = place.run("nbdserve --stdio -r -f raw disk.raw", closed)
        assert done.returncode == 2
        assert done.stderr.endswith("must be one socket, or two pipes\n")
        assert done.stderr.count("\n") == 1


@contextlib.contextmanager
def daemon(pid_file: Path) -> Iterator[None]:
    """A daemon that is told to end."""
    process = psutil.Process(int(pid_file.read_text()))
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not process.is_running(), "the daemon ends")


def greet(path: Path) -> None:
    """A server answers there."""
    with UnixAddress(path).connect() as client:
        assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
