"""What holds for every test: it leaves no process behind, and its servers' logs are shown when it fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tests.support.processes import NotReadyError, wait_until
from tests.support.sampling import leave_out_the_others

# Inherited by every process that the run starts, also by daemons that left the process tree.
TAG = "NBD_TEST_RUN"
LAST_BYTES_OF_LOG = 20_000


def pytest_configure(config: pytest.Config) -> None:
    """Mark this run in the environment of all its children, and give them the signals' usual meanings.

    A shell lets what it starts in the background ignore SIGINT and SIGQUIT, and a shell that was started so
    can never trap them.
    """
    os.environ[TAG] = uuid.uuid4().hex
    # Migrations of the machine on which the tests run are none of theirs.
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="nbd-test-state-")
    # On a busy machine everything may be slow.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    for number in (signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Forget the migrations that tests have begun."""
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have `make test` run some cells of each large matrix."""
    leave_out_the_others(items)


def _all_pids() -> set[int]:
    """The ids of all processes of this machine."""
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


def _environment(pid: int) -> bytes:
    """The environment that a process was started with; empty for a zombie, which is dead already."""
    entry = Path(f"/proc/{pid}")
    for _ in range(20):
        try:
            environment = (entry / "environ").read_bytes()
            (entry / "exe").readlink()
        except OSError:
            return b""
        if environment:
            return environment
        time.sleep(0.001)  # in the middle of an exec
    return b""


def _started_since(before: set[int]) -> list[int]:
    """The living processes that this run has started since, daemons as well."""
    tag = f"{TAG}={os.environ[TAG]}".encode()
    return [pid for pid in _all_pids() - before if tag in _environment(pid).split(b"\0")]


@pytest.fixture(autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    """Fail the test when a process that it started outlives it; fixtures of a wider scope may keep theirs."""
    before = _all_pids()
    yield
    try:
        wait_until(lambda: not _started_since(before), "all processes have ended", seconds=2.0)
    except NotReadyError:
        left = []
        for process in map(psutil.Process, _started_since(before)):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(f"{process.pid}: {' '.join(process.cmdline())}")
                process.kill()
        pytest.fail("\n".join(["the test left processes behind (killed now):", *left]), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of every log that the test's directories and servers hold to the report of a failure."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for log in _logs_of(item):
            text = log.read_bytes()[-LAST_BYTES_OF_LOG:].decode(errors="replace")
            report.sections.append((str(log), text))
    return report


def _logs_of(item: pytest.Function) -> list[Path]:
    """The log files under the test's temporary directories, and those of the servers it uses."""
    logs: set[Path] = set()
    for value in getattr(item, "funcargs", {}).values():
        if isinstance(value, Path) and value.is_dir():
            logs.update(value.rglob("*.log"))
        elif isinstance(log := getattr(value, "log", None), Path) and log.exists():
            logs.add(log)
    return sorted(logs)
