"""Supervisors and children: who ends with whom, and what is said about it. The kept processes are shells."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil
import pytest

from recipes.errors import MigrationError
from recipes.hosts.host import Host, module
from recipes.processes.children import Child, Children
from tests.support.processes import check, dying_with_parent, wait_until
from tests.support.sshd import sshd
from tests.support.vms import NBD_MIGRATE, lives

HERE = Host("this host")
SLEEP = ["sleep", "1000"]
STUBBORN = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"]


def run(body: Callable[[Children], Awaitable[None]]) -> None:
    """Run the body with a Children of its own, under a time limit."""

    async def main() -> None:
        async with Children() as children:
            await body(children)

    asyncio.run(asyncio.wait_for(main(), 300.0))


def test_a_child_ends_with_its_children(tmp_path: Path) -> None:
    started: list[Child] = []

    async def body(children: Children) -> None:
        started.append(await children.start("a sleeper", HERE, tmp_path / "log", SLEEP))
        assert lives(started[0].pid)

    run(body)
    assert not lives(started[0].pid)


def test_a_child_that_was_released_lives_on(tmp_path: Path) -> None:
    started: list[Child] = []

    async def body(children: Children) -> None:
        started.append(await children.start("a sleeper", HERE, tmp_path / "log", SLEEP))
        started[0].release()

    run(body)
    assert lives(started[0].pid)
    os.kill(started[0].pid, signal.SIGKILL)


def test_a_child_says_how_it_ended_and_what_it_wrote_last(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        words = ["sh", "-c", "echo first; echo the reason >&2; exit 7"]
        child = await children.start("a talker", HERE, tmp_path / "log", words)
        assert await child.wait() == "ended with code 7: the reason"
        assert child.status == 7

    run(body)
    assert (tmp_path / "log").read_text() == "first\nthe reason\n"


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        child = await children.start("a stubborn one", HERE, tmp_path / "log", STUBBORN)
        while "deaf" not in (tmp_path / "log").read_text():
            await asyncio.sleep(0.01)
        await child.stop(0.3)
        assert await child.wait() == "was ended by signal 9"

    run(body)


def test_a_child_can_be_stopped_after_it_was_released(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        child = await children.start("a sleeper", HERE, tmp_path / "log", SLEEP)
        child.release()
        await child.stop(60.0)
        assert child.status == -signal.SIGTERM

    run(body)


@pytest.mark.parametrize("released", [False, True])
def test_a_supervisor_that_is_killed_takes_its_child_along_unless_it_was_released(
    tmp_path: Path, released: bool
) -> None:
    async def body(children: Children) -> None:
        child = await children.start("a sleeper", HERE, tmp_path / "log", SLEEP)
        if released:
            child.release()
            await asyncio.sleep(0.2)
        os.kill(psutil.Process(child.pid).ppid(), signal.SIGKILL)
        if released:
            await asyncio.sleep(0.3)
            assert child.running
            await child.stop(60.0)
        assert await asyncio.wait_for(child.wait(), 60.0) == "ended, as its supervisor was killed"
        assert not lives(child.pid)

    run(body)


def test_a_release_counts_when_the_supervisor_has_said_so(tmp_path: Path, impatient: None) -> None:
    """The word may be lost on its way to another host, and the process would end with us after all."""

    async def body(children: Children) -> None:
        child = await children.start("a sleeper", HERE, tmp_path / "log", SLEEP)
        supervisor = stop_supervisor(child)
        assert child.release()
        with pytest.raises(
            MigrationError, match="a sleeper would not outlive us: its supervisor does not answer"
        ):
            await child.released_for_sure()
        supervisor.resume()
        await child.released_for_sure()
        await child.stop(60.0)

    run(body)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervisors are not waited for for long."""
    monkeypatch.setattr("recipes.processes.child.SUPERVISOR_ANSWER", 1.0)
    monkeypatch.setattr("recipes.processes.child.SUPERVISOR_END", 1.0)


def stop_supervisor(child: Child) -> psutil.Process:
    """Stop the parent of a local child, as somebody with a wrong number may."""
    supervisor = psutil.Process(child.pid).parent()
    assert supervisor
    supervisor.suspend()
    wait_until(lambda: supervisor.status() == psutil.STATUS_STOPPED, "it is stopped")
    return supervisor


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("words", [SLEEP, STUBBORN])
def test_a_child_whose_supervisor_was_stopped_is_ended_without_it(tmp_path: Path, words: list[str]) -> None:
    kept: list[psutil.Process] = []

    async def body(children: Children) -> None:
        child = await children.start("a server", HERE, tmp_path / "log", words)
        kept.append(stop_supervisor(child))
        await child.stop(1.0)
        assert await child.wait() == "ended, and its supervisor does not say how"
        assert not lives(child.pid)

    run(body)
    wait_until(lambda: not lives(kept[0].pid), "it was killed")


@pytest.mark.usefixtures("impatient")
def test_the_end_of_a_child_is_seen_although_its_supervisor_was_stopped(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        child = await children.start("a server", HERE, tmp_path / "log", SLEEP)
        supervisor = stop_supervisor(child)
        os.kill(child.pid, signal.SIGKILL)
        assert await child.wait() == "ended, and its supervisor does not say how"
        supervisor.resume()

    run(body)


@pytest.mark.usefixtures("impatient")
def test_a_child_on_another_host_whose_supervisor_was_stopped_is_ended_without_it(tmp_path: Path) -> None:
    with sshd(tmp_path) as server:
        host = Host("A", server.prefix, str(Path(sys.executable).parent))

        async def body(children: Children) -> None:
            child = await children.start("a server", host, tmp_path / "log", SLEEP)
            supervisor = stop_supervisor(child)
            await child.stop(1.0)
            assert not lives(child.pid)
            supervisor.kill()

        run(body)


def test_a_process_that_has_the_id_of_a_child_on_another_host_by_now_is_left_alone(tmp_path: Path) -> None:
    """A host that was away says nothing of the child's end, and may have started anew meanwhile."""
    with (
        sshd(tmp_path) as server,
        subprocess.Popen([*dying_with_parent(signal.SIGKILL), *SLEEP]) as bystander,
    ):
        host = Host("A", server.prefix, str(Path(sys.executable).parent))

        async def body(children: Children) -> None:
            child = Child("a server", host, bystander.pid, mark=str(tmp_path / "its.pid"))
            await child.stop(5.0)
            assert not child.running
            assert lives(bystander.pid)

        run(body)
        bystander.kill()


def test_a_line_that_is_no_message_does_not_end_the_following_of_a_child(tmp_path: Path) -> None:
    noisy = Host("A", ("sh", "-c", '(sleep 0.5; echo; echo 1; echo Hello) & exec "$@"', "sh"))

    async def body(children: Children) -> None:
        child = await children.start("a server", noisy, tmp_path / "log", ["sh", "-c", "sleep 1; exit 7"])
        assert await child.wait() == "ended with code 7"

    run(body)


def test_a_child_is_ready_when_it_has_made_its_file(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("left from another run\n")

    async def body(children: Children) -> None:
        words = ["sh", "-c", f"sleep 0.3; echo $$ >{ready}; exec sleep 1000"]
        child = await children.start("a server", HERE, tmp_path / "log", words, ready=ready)
        await child.ready(5.0)
        assert ready.read_text() == f"{child.pid}\n"

    run(body)


def test_a_file_that_another_living_process_has_is_no_sign_and_stays(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("17\n")

    async def body(children: Children) -> None:
        words = ["sh", "-c", "sleep 0.3; exit 1"]
        child = await children.start("a server", HERE, tmp_path / "log", words, ready=ready)
        with pytest.raises(MigrationError, match="a server ended with code 1"):
            await child.ready(5.0)

    run(body)
    assert ready.read_text() == "17\n"


def test_a_child_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        words = ["sh", "-c", "echo the port is taken; exit 1"]
        child = await children.start("a server", HERE, tmp_path / "log", words, ready=tmp_path / "ready")
        with pytest.raises(MigrationError, match="a server ended with code 1: the port is taken"):
            await child.ready(5.0)

    run(body)


def test_a_child_that_never_gets_ready_is_waited_for_only_so_long(tmp_path: Path) -> None:
    async def body(children: Children) -> None:
        child = await children.start("a server", HERE, tmp_path / "log", SLEEP, ready=tmp_path / "ready")
        with pytest.raises(MigrationError, match=r"a server was not ready within 0\.2 s"):
            await child.ready(0.2)

    run(body)


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        (HERE, "a thing on this host cannot be started: /no/such: No such file or directory"),
        (Host("A", ("/no/shell",)), "a thing on A: /no/shell: No such file or directory"),
        (Host("A", ("sh", "-c", "echo no route >&2; exit 255")), "a thing on A cannot be started: no route"),
    ],
)
def test_a_child_that_cannot_be_started_says_why(tmp_path: Path, host: Host, complaint: str) -> None:
    async def body(children: Children) -> None:
        with pytest.raises(MigrationError, match=complaint):
            await children.start("a thing", host, tmp_path / "log", ["/no/such"])

    run(body)


@pytest.fixture(params=["here", "by ssh"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """This host, and one that is reached by ssh."""
    if request.param == "here":
        yield HERE
        return
    with sshd(tmp_path) as server:
        yield Host("A", server.prefix, str(Path(sys.executable).parent))


def supervisor_of(pid: int) -> psutil.Process:
    """The parent of a process."""
    found = psutil.Process(pid).parent()
    assert found
    return found


TALKER = ["sh", "-c", "read -r code <its.fifo; echo the reason >&2; exit $code", "its.mark"]
"""Ends when it is told a code by a FIFO."""


def talker(tmp_path: Path, host: Host) -> int:
    """A process that was released, and whose holder has gone."""
    fifo = tmp_path / "its.fifo"
    os.mkfifo(fifo)
    started: list[int] = []

    async def body(children: Children) -> None:
        words = [word.replace("its.fifo", str(fifo)) for word in TALKER]
        child = await children.start("a talker", host, tmp_path / "its.log", words)
        child.release()
        await child.released_for_sure()
        started.append(child.pid)

    run(body)
    return started[0]


def end_taken_over(pid: int, host: Host, log: Path) -> str:
    """Take a talker over and end it; return what is said of its end."""
    ends: list[str] = []

    async def body(children: Children) -> None:
        child = await children.adopt_process("a talker", host, pid, "its.mark", log)
        assert child
        await child.stop(60.0)
        ends.append(await child.wait())

    run(body)
    assert not lives(pid)
    return ends[0]


def test_a_process_that_was_released_is_taken_over_with_its_supervisor(tmp_path: Path, host: Host) -> None:
    """As if its first holder had never gone: its end is told as it was."""
    pid = talker(tmp_path, host)
    kept = supervisor_of(pid)
    assert any("supervisor" in word for word in kept.cmdline())

    async def body(children: Children) -> None:
        log = tmp_path / "its.log"
        assert await children.adopt_process("a talker", host, pid, "another mark", log) is None
        child = await children.adopt_process("a talker", host, pid, "its.mark", log)
        assert child
        assert child.running
        (tmp_path / "its.fifo").write_text("7\n")
        assert await child.wait() == "ended with code 7: the reason"

    run(body)
    wait_until(lambda: not lives(kept.pid), "its supervisor ends")
    assert not (tmp_path / "its.supervisor").exists()


def test_a_process_that_is_found_by_its_file_is_ready(tmp_path: Path, host: Host) -> None:
    """Its supervisor has said so once, to a holder that has gone."""
    ready = tmp_path / "its.pid"

    async def start(children: Children) -> None:
        words = ["sh", "-c", f"echo $$ >{ready}; sleep 1000; :"]
        child = await children.start("a server", host, tmp_path / "its.log", words, ready=ready)
        await child.ready(60.0)
        child.release()
        await child.released_for_sure()

    async def take_over(children: Children) -> None:
        child = await children.adopt("a server", host, ready)
        assert child
        await child.ready(0.0)
        await child.stop(60.0)

    run(start)
    run(take_over)


def test_who_is_there_when_a_process_ends_does_not_matter_to_it(tmp_path: Path, host: Host) -> None:
    """One holder after the other comes and goes; the last one ends it."""
    pid = talker(tmp_path, host)
    log = tmp_path / "its.log"

    async def look(children: Children) -> None:
        assert await children.adopt_process("a talker", host, pid, "its.mark", log)

    for _ in range(3):
        run(look)
        assert lives(pid)

    assert end_taken_over(pid, host, log) == "was ended by signal 15"


def test_the_newest_holder_is_listened_to(tmp_path: Path) -> None:
    """The one before may be behind a line that is dead, and never say that it has gone."""
    pid = talker(tmp_path, HERE)
    argv = module("attach", str(tmp_path / "its.log"))
    words = [*dying_with_parent(signal.SIGKILL), *argv]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout
        assert json.loads(first.stdout.readline()) == {"started": pid}
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
            assert second.stdout
            assert json.loads(second.stdout.readline()) == {"started": pid}
            # Whoever closes his input has gone, and may not hear of the end.
            second.communicate(b"stop 60\n" + b"x" * 100, timeout=60.0)
        assert json.loads(first.stdout.readline()) == {"released": True}
        assert first.wait(60.0) == 0
    wait_until(lambda: not lives(pid), "it is ended")


def test_a_supervisor_without_descriptors_keeps_its_process_and_a_holder_waits(tmp_path: Path) -> None:
    pid = talker(tmp_path, HERE)
    kept = supervisor_of(pid)
    most = resource.prlimit(kept.pid, resource.RLIMIT_NOFILE)
    taken = {int(each) for each in os.listdir(f"/proc/{kept.pid}/fd")}
    free = next(number for number in count() if number not in taken)
    resource.prlimit(kept.pid, resource.RLIMIT_NOFILE, (free, most[1]))
    before = kept.num_ctx_switches().voluntary
    words = [*dying_with_parent(signal.SIGKILL), *module("attach", str(tmp_path / "its.log"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        # Each attempt is followed by a rest.
        wait_until(lambda: kept.num_ctx_switches().voluntary > before + 2, "it has tried several times")
        resource.prlimit(kept.pid, resource.RLIMIT_NOFILE, most)
        assert json.loads(holder.stdout.readline()) == {"started": pid}
        holder.communicate(b"stop 60\n", timeout=60.0)
    wait_until(lambda: not lives(pid), "it is ended")


def test_a_supervisor_that_is_left_for_good_ends_and_its_process_does_not(tmp_path: Path, host: Host) -> None:
    started: list[psutil.Process] = []

    async def body(children: Children) -> None:
        child = await children.start("a sleeper", host, tmp_path / "log", SLEEP)
        child.release()
        child.leave()
        started.extend([psutil.Process(child.pid), supervisor_of(child.pid)])

    run(body)
    process, kept = started
    wait_until(lambda: not lives(kept.pid), "its supervisor ends")
    assert lives(process.pid)
    assert not (tmp_path / "log.supervisor").exists()
    process.kill()


def test_a_process_whose_supervisor_is_dead_is_taken_over_without(tmp_path: Path, host: Host) -> None:
    pid = talker(tmp_path, host)
    supervisor_of(pid).kill()
    assert end_taken_over(pid, host, tmp_path / "its.log") == "has ended"
    # What the dead one has left is in nobody's way.
    (tmp_path / "its.fifo").unlink()
    again = talker(tmp_path, host)
    supervisor_of(again)
    os.kill(again, signal.SIGKILL)
    wait_until(lambda: not (tmp_path / "its.supervisor").exists(), "nothing is left")


def test_only_its_owner_may_speak_with_a_supervisor(tmp_path: Path) -> None:
    """However deep its process's log lies: a socket's path has 107 bytes."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    pid = talker(deep, HERE)
    assert (deep / "its.supervisor").stat().st_mode & 0o777 == 0o600
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not (deep / "its.supervisor").exists(), "nothing is left")


@contextmanager
def supervisor(tmp_path: Path, command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A supervisor of this command, without Children, and the process id of what it keeps."""
    argv = module("supervisor", str(tmp_path / "log"), "", *command)
    words = [*dying_with_parent(signal.SIGKILL), *argv]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield process, json.loads(process.stdout.readline())["started"]


def test_the_end_of_its_input_ends_a_supervisor_and_what_it_keeps(tmp_path: Path) -> None:
    with supervisor(tmp_path, SLEEP) as (process, pid):
        output, _ = process.communicate(timeout=60.0)
        assert json.loads(output) == {"exited": -signal.SIGTERM, "tail": ""}
        assert not lives(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_cannot_end_a_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    with supervisor(tmp_path, SLEEP) as (process, pid):
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert lives(pid)
        process.communicate(b"stop 1\n", timeout=60.0)


@pytest.mark.parametrize(
    "word", ["stop", "stop abc", "stop nan", "stop inf", "stop -1", "", "x" * 100000, "\0\xff"]
)
def test_a_word_that_is_none_does_not_end_a_supervisor(tmp_path: Path, word: str) -> None:
    with supervisor(tmp_path, SLEEP) as (process, pid):
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{word}\n".encode("latin-1"))
        process.stdin.flush()
        assert "unknown" in json.loads(process.stdout.readline())
        assert lives(pid)
        output, _ = process.communicate(b"stop 60\n", timeout=60.0)
        assert b'"exited"' in output


@pytest.mark.parametrize(
    "words", [["attach", ""], ["attach", "/"], ["attach", "."], ["attach", "/no/" + "x" * 240]]
)
def test_who_is_led_to_no_supervisor_is_told_so(words: list[str]) -> None:
    done = subprocess.run([NBD_MIGRATE, *words], capture_output=True, timeout=60, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["failed"].rpartition(": ")[2] not in ("", "None")


@pytest.mark.parametrize(
    "words", [["attach"], ["attach", "a", "b"], ["supervisor"], ["supervisor", "log", ""]]
)
def test_what_a_small_program_lacks_is_said(words: list[str]) -> None:
    done = subprocess.run([NBD_MIGRATE, *words], capture_output=True, timeout=60, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"nbd-migrate: {words[0]} needs LOG")


def test_a_whole_session_ends_with_its_first_process(tmp_path: Path) -> None:
    grandchild = tmp_path / "grandchild"
    with supervisor(tmp_path, ["sh", "-c", f"sleep 1000 & echo $! >{grandchild}; wait"]) as (process, _):
        wait_until(lambda: grandchild.exists() and grandchild.read_text(), "the grandchild")
        process.communicate(timeout=60.0)
    pid = int(grandchild.read_text())
    wait_until(lambda: not lives(pid), "the grandchild ends")


def test_the_end_of_a_log_without_an_end_is_not_looked_for() -> None:
    """A log may be a link to a device; this one is read like /dev/zero."""
    limit = ["prlimit", f"--as={1 << 30}"]
    assert '"exited": ' in check(*limit, *module("supervisor", "/dev/full", "", "true"))
