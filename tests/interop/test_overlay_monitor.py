"""The overlay's block job is, to a client of its monitor, QEMU's: the same replies, refusals and events."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdserve.common.uri import parse_uri
from nbdserve.connection.listeners import listen_unix
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Exports
from nbdserve.service.server import Server
from overlay.backing.failover import Sources
from overlay.daemon import Daemon
from overlay.formats.open import open_image
from overlay.monitor.control import served
from overlay.options import Options
from tests.support.disks import MIB, random_disk
from tests.support.jobs import Message, Talk, storage_daemon, talk
from tests.support.overlays import make_overlay, overlay
from tests.support.processes import check, run
from tests.support.servers import UnixAddress, nbdkit, nbdserve

SIZE = 8 * MIB
SLOW = 64 * 1024
JOB = {"device": "disk", "job_id": "job"}
# What a job has done at some moment is of this run; and QEMU measures how far it is when it is asked.
OF_THE_MOMENT = ("len", "offset", "speed", "busy", "current-progress", "total-progress")

Session = Callable[[Talk], None]


def to_the_end(client: Talk) -> None:
    """A job that completes."""
    client.ask("block-stream", **JOB)
    client.listen_until("JOB_STATUS_CHANGE", status="null")
    client.ask("query-block-jobs")
    client.ask("query-jobs")


def to_the_end_twice(client: Talk) -> None:
    """A second job, that has nothing to do."""
    to_the_end(client)
    client.take_events()
    to_the_end(client)


def controlled(client: Talk) -> None:
    """A job that is paused, resumed, cancelled, and asked for what it cannot do."""
    client.ask("block-job-pause", device="job")
    client.ask("block-stream", device="disk", job_id="1 job")
    client.ask("block-stream", **JOB, speed=SLOW)
    client.listen_until("JOB_STATUS_CHANGE", status="running")
    client.ask("query-block-jobs")
    client.ask("query-jobs")
    client.ask("block-stream", **JOB)
    client.ask("block-stream", device="disk", job_id="other")
    client.ask("block-job-set-speed", device="job", speed=-1)
    client.ask("block-job-set-speed", device="other", speed=1)
    client.ask("block-job-resume", device="job")
    client.ask("block-job-pause", device="job")
    client.listen_until("JOB_STATUS_CHANGE", status="paused")
    client.ask("query-block-jobs")
    client.ask("query-jobs")
    client.ask("block-job-pause", device="job")
    client.ask("block-job-cancel", device="job")
    client.ask("block-job-resume", device="job")
    client.ask("block-job-cancel", device="job")
    client.listen_until("JOB_STATUS_CHANGE", status="null")
    client.ask("query-block-jobs")
    client.ask("block-stream", job_id="job")


def summary(message: Message) -> object:
    """What must be the same, of a reply or an event."""
    if isinstance(message, dict):
        return {key: summary(value) for key, value in message.items() if key not in OF_THE_MOMENT}
    return [summary(each) for each in message] if isinstance(message, list) else message


def keys(message: object) -> object:
    """The names of all members, those of the moment too."""
    if isinstance(message, dict):
        return {key: keys(value) for key, value in message.items()}
    return [keys(each) for each in message] if isinstance(message, list) else None


def replies_and_events(heard: list[Message]) -> tuple[list[Message], list[Message]]:
    """Both, each in their order. QEMU tells events before, or after, the reply as it happens to come."""
    events = [message for message in heard if "event" in message]
    return [message for message in heard if "event" not in message], events


@pytest.mark.parametrize("session", [to_the_end, to_the_end_twice, controlled])
def test_a_session_is_that_which_qemu_has(session: Session, tmp_path: Path) -> None:
    random_disk(tmp_path / "base.img", SIZE)
    image = tmp_path / "qemu.qed"
    check("qemu-img", "create", "-q", "-f", "qed", "-b", tmp_path / "base.img", "-F", "raw", image)
    devices = (f"file,node-name=file,filename={image}", "qed,node-name=disk,file=file")
    with storage_daemon(tmp_path, *devices) as path, talk(path) as client:
        session(client)
        theirs = client.heard
    with ExitStack() as stack:
        source = stack.enter_context(nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path))
        ours_image = make_overlay(tmp_path / "ours.qed", "qed", SIZE, source.uri())
        daemon = stack.enter_context(overlay(ours_image, directory=tmp_path))
        client = stack.enter_context(talk(daemon.qmp_path))
        session(client)
        ours = client.heard
    # The first two are the greeting and the reply to qmp_capabilities.
    for mine, qemus in zip(replies_and_events(ours), replies_and_events(theirs), strict=True):
        mine, qemus = [each for each in mine if "QMP" not in each], [e for e in qemus if "QMP" not in e]
        assert [summary(each) for each in mine] == [summary(each) for each in qemus]
        assert [keys(each) for each in mine] == [keys(each) for each in qemus]


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The monitor of an overlay on a source whose reads fail while a file exists; and that file."""
    random_disk(tmp_path / "base.img", SIZE)
    trigger = tmp_path / "fail"
    trigger.touch()
    options = ("--filter=error", "file", tmp_path / "base.img", "error-pread-rate=100%")
    with ExitStack() as stack:
        source = stack.enter_context(nbdkit(*options, f"error-pread-file={trigger}", directory=tmp_path))
        image = make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())
        yield stack.enter_context(overlay(image, directory=tmp_path)).qmp_path, trigger


def statuses(events: list[Message]) -> list[str]:
    """What happened, in a word each."""
    return [each["data"].get("status", each["event"]) for each in events]


def test_a_job_that_fails_waits_and_goes_on_when_it_is_resumed(failing: tuple[Path, Path]) -> None:
    path, trigger = failing
    with talk(path) as client:
        client.ask("block-stream", **JOB)
        client.listen_until("JOB_STATUS_CHANGE", status="paused")
        error = {"device": "job", "operation": "read", "action": "stop"}
        assert {"event": "BLOCK_JOB_ERROR", "data": error} in client.heard
        assert statuses(client.take_events()) == ["created", "running", "BLOCK_JOB_ERROR", "paused"]
        (job,) = client.ask("query-block-jobs")["return"]
        assert (job["status"], job["io-status"], job["paused"], job["busy"]) == (
            "paused",
            "failed",
            True,
            False,
        )
        assert "error" not in job, "as in QEMU it is not over"
        assert "cannot be read" in client.ask("query-overlay")["return"]["error"]
        assert client.ask("block-job-pause", device="job")["error"]["desc"] == "Job is already paused"
        trigger.unlink()
        client.ask("block-job-resume", device="job")
        client.listen_until("JOB_STATUS_CHANGE", status="null")
        assert statuses(client.take_events()) == [
            *("running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null")
        ]


def test_a_job_that_is_to_report_errors_ends_with_one_and_may_be_started_again(
    failing: tuple[Path, Path],
) -> None:
    path, trigger = failing
    with talk(path) as client:
        client.ask("block-stream", **JOB, on_error="report")
        client.listen_until("JOB_STATUS_CHANGE", status="null")
        events = client.take_events()
        assert statuses(events) == [
            *("created", "running", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null")
        ]
        (completed,) = [each["data"] for each in events if each["event"] == "BLOCK_JOB_COMPLETED"]
        assert "cannot be read" in completed["error"]
        assert client.ask("query-block-jobs")["return"] == []
        trigger.unlink()
        client.ask("block-stream", **JOB)
        client.listen_until("BLOCK_JOB_COMPLETED", len=SIZE, offset=SIZE)


def test_a_cancelled_job_that_was_paused_needs_force(failing: tuple[Path, Path]) -> None:
    path, _ = failing
    with talk(path) as client:
        client.ask("block-stream", **JOB)
        client.listen_until("JOB_STATUS_CHANGE", status="paused")
        refusal = client.ask("block-job-cancel", device="job")
        assert refusal["error"]["desc"] == "The block job for device 'job' is currently paused"
        client.ask("block-job-cancel", device="job", force=True)
        client.listen_until("JOB_STATUS_CHANGE", status="null")
        assert statuses(client.take_events())[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def test_progress_goes_on_when_copies_are_invalidated(tmp_path: Path) -> None:
    random_disk(tmp_path / "base.img", SIZE)
    with ExitStack() as stack:
        source = stack.enter_context(nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path))
        image = make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())
        daemon = stack.enter_context(overlay(image, "--speed", str(MIB), directory=tmp_path))
        client = stack.enter_context(talk(daemon.qmp_path))
        client.ask("block-stream", **JOB)
        seen, length = [0], SIZE
        while jobs := client.ask("query-block-jobs")["return"]:
            assert seen[-1] <= jobs[0]["offset"] <= jobs[0]["len"] == length
            seen.append(jobs[0]["offset"])
            if jobs[0]["offset"] >= MIB // 2 and length == SIZE:
                assert "return" in client.ask("overlay-invalidate", offset=0, length=MIB)
                (job,) = client.ask("query-block-jobs")["return"]
                length = job["len"]
                assert SIZE < length <= SIZE + MIB, "what had been copied is to be copied again"
                client.ask("block-job-set-speed", device="job", speed=4 * MIB)
        client.listen_until("BLOCK_JOB_COMPLETED", len=length, offset=length)
        assert len(seen) > 10
    assert (tmp_path / "disk").read_bytes() == (tmp_path / "base.img").read_bytes()


@contextmanager
def in_this_process(directory: Path) -> Iterator[tuple[Daemon, Path]]:
    """A daemon without an export, and the socket of its monitor."""
    source = UnixAddress(directory / "nobody.sock")
    image = make_overlay(directory / "disk", "flat", SIZE, source.uri())
    options = Options(image, str(directory / "unused.sock"))
    with open_image(image, writable=True, layout="flat") as opened, ExitStack() as stack:
        daemon = Daemon(opened, Sources([parse_uri(source.uri())], SIZE), options)
        listener = listen_unix(str(directory / "monitor.sock"))
        stack.callback(listener.close)
        stack.callback(daemon.stop)
        stack.enter_context(served(Server(Exports(), [], Policy()), daemon, listener))
        daemon.start()
        yield daemon, directory / "monitor.sock"


@pytest.mark.parametrize(
    ("command", "method", "given"),
    [
        ("overlay-invalidate", "invalidate", {"offset": 0, "length": MIB}),
        ("overlay-activate", "activate", {}),
    ],
)
def test_a_command_that_waits_keeps_no_other_client_of_the_monitor_waiting(
    command: str, method: str, given: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a server, or the disk, hangs."""
    waiting, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        waiting.set()
        assert go_on.wait(600)

    with in_this_process(tmp_path) as (daemon, path), ExitStack() as stack:
        monkeypatch.setattr(daemon.overlay, method, wait)
        first, second = (stack.enter_context(talk(path)) for _ in range(2))
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.callback(go_on.set)
        answer = pool.submit(first.ask, command, **given)
        assert waiting.wait(60)
        for other in ("query-overlay", "query-block-jobs", "query-jobs"):
            assert "return" in second.ask(other)
        assert not answer.done()
        go_on.set()
        assert "return" in answer.result(60)


def test_invalidating_what_the_guest_depends_on_is_refused(tmp_path: Path) -> None:
    random_disk(tmp_path / "base.img", SIZE)
    with ExitStack() as stack:
        source = stack.enter_context(nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path))
        image = make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        client = stack.enter_context(talk(daemon.qmp_path))
        client.ask("overlay-activate")
        refusal = client.ask("overlay-invalidate", offset=0, length=MIB)["error"]["desc"]
        assert "the guest runs here" in refusal
        assert "Errno" not in refusal
        refusal = client.ask("overlay-invalidate", offset=SIZE, length=1)["error"]["desc"]
        assert "not within the disk" in refusal


def test_qmp_shell_works_unchanged(tmp_path: Path) -> None:
    random_disk(tmp_path / "base.img", SIZE)
    shell = shutil.which("qmp-shell", path=str(Path(sys.executable).parent))
    assert shell, "it comes with qemu.qmp"
    with ExitStack() as stack:
        source = stack.enter_context(nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path))
        image = make_overlay(tmp_path / "disk", "flat", SIZE, source.uri())
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        typed = f"block-stream device=disk job-id=job speed={SLOW}\nquery-block-jobs\n"
        done = run(shell, daemon.qmp_path, stdin=typed, seconds=30, env={"HOME": str(tmp_path)})
        assert '"return": {}' in done.stdout, done.stdout + done.stderr
        assert '"type": "stream"' in done.stdout
