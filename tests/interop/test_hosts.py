"""Commands on hosts behind a real ssh, sudo and other prefixes: what comes back, what is said of failures."""

from __future__ import annotations

import gc
import os
import re
import shlex
import socket
import stat
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts import ssh
from recipes.hosts.calls import HostError
from recipes.hosts.host import Host
from recipes.processes.children import Children
from tests.support.guests import short_directory
from tests.support.processes import check, run, wait_until
from tests.support.servers import NBDSERVE, free_tcp_address
from tests.support.sshd import Sshd, sshd

LIMIT = 30.0
GREETING = (
    "ForceCommand echo 'Welcome to {here}'; printf 'no end of the line'; eval \"$SSH_ORIGINAL_COMMAND\""
)
AWKWARD = "a  b'c\"d;e&$HOME\\|*\tf`g`(#~)!"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    """A server that greets whoever comes, on both outputs."""
    banner = tmp_path / "banner"
    banner.write_text("Authorized access only\n")
    with sshd(tmp_path, f"Banner {banner}", GREETING) as made:
        yield made


def answer(work: Coroutine[Any, Any, Any]) -> Any:
    """Do the work as the orchestrator does."""
    return clock.run(work)


def complaint(host: Host, limit: float = LIMIT) -> str:
    """Why a command cannot be run there."""
    with pytest.raises(HostError) as caught:
        answer(prepared_run(host, "true", limit))
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def prepared_run(host: Host, command: str, limit: float) -> str:
    """Run one word, with the options that a migration adds."""
    return await (await host.prepared(limit * 2 / 3)).run(command, limit=limit)


def test_words_arrive_as_they_are_and_greetings_are_no_output(server: Sshd) -> None:
    for shell in (server.prefix, (*server.prefix, "env", "-u", "HOME"), ("env", "X=ssh", *server.prefix)):
        host = Host("A", shell)
        assert answer(host.run("printf", "%s", AWKWARD, limit=LIMIT)) == AWKWARD
        assert answer(host.run("true", limit=LIMIT)) == ""
        assert answer(host.run("echo", "a\nb", "c", limit=LIMIT)) == "a\nb c\n"
        assert answer(host.test("-d", "/", LIMIT))
        assert not answer(host.test("-e", "/no such", LIMIT))
        assert answer(host.tests([("-e", "/no such"), ("-d", "/")], LIMIT)) == [False, True]
        assert answer(host.has("sh", LIMIT))
        assert not answer(host.has("no-such-command", LIMIT))


def test_one_ssh_leads_to_the_next(server: Sshd) -> None:
    host = Host("A", (*server.prefix, *server.prefix))
    assert answer(host.run("printf", "%s", AWKWARD, limit=LIMIT)) == AWKWARD


def test_of_a_command_that_fails_its_own_last_line_is_told(server: Sshd) -> None:
    host = Host("A", server.prefix)
    with pytest.raises(
        MigrationError, match=r"^ls on A: ls: cannot access '/no such': No such file"
    ) as caught:
        answer(host.run("ls", "/no such", limit=LIMIT))
    assert not isinstance(caught.value, HostError)
    with pytest.raises(MigrationError, match=r"^sh on A: exit code 255$"):
        answer(host.run("sh", "-c", "exit 255", limit=LIMIT))
    with pytest.raises(MigrationError, match=r"^there is no no-such-command on A; install it there$"):
        answer(host.run("no-such-command", limit=LIMIT))


def unknown(server: Sshd) -> str:
    """The client has never heard of the server."""
    server.known_hosts.unlink()
    by_hand = rf"ssh .*{server.address.host} true"
    return rf"Host key verification failed; connect once by hand and confirm its key: {by_hand}$"


def changed(server: Sshd) -> str:
    """The server has another key than the client thinks."""
    other = (server.directory / "key.pub").read_text()
    server.known_hosts.write_text(f"[{server.address.host}]:{server.address.port} {other}")
    return r"Host key for \S+ has changed.*; if that host was .*, remove its old key: ssh-keygen .*$"


def forbidden(server: Sshd) -> str:
    """The server lets nobody in."""
    (server.directory / "authorized").write_text("")
    return (
        r"Permission denied \(publickey\); nobody can be asked for a password here: see that a key of yours"
    )


def without_key(server: Sshd) -> str:
    """The client has lost its key."""
    server.key.unlink()
    return r"Permission denied \(publickey\); nobody can be asked"


@pytest.mark.parametrize("make", [unknown, changed, forbidden, without_key])
def test_what_ssh_said_is_repeated_with_what_to_do(server: Sshd, make: Callable[[Sshd], str]) -> None:
    expected = make(server)
    host = Host("A", server.prefix)
    assert re.search(expected, complaint(host))

    async def start() -> None:
        async with Children() as children:
            await children.start("a thing", await host.prepared(5.0), server.directory / "log", ["true"])

    with pytest.raises(MigrationError, match=f"^a thing on A cannot be started: .*{expected}"):
        answer(start())
    with pytest.raises(HostError, match=expected):
        answer(host.has("true", LIMIT))


def test_the_remedies_for_keys_of_hosts_help_when_they_are_typed(server: Sshd) -> None:
    host = Host("A", server.prefix)
    changed(server)
    check("bash", "-c", complaint(host).partition("remove its old key: ")[2])
    confirm = server.directory / "confirm"
    confirm.write_text("#!/bin/sh\necho yes\n")
    confirm.chmod(0o755)
    typed = complaint(host).partition("confirm its key: ")[2]
    asked = {"SSH_ASKPASS": str(confirm), "SSH_ASKPASS_REQUIRE": "force"}
    assert run("bash", "-c", typed, env=asked).returncode == 0
    assert answer(host.run("echo", "in", limit=LIMIT)) == "in\n"


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        (("-p", str(free_tcp_address().port), "127.0.0.1"), "Connection refused; see that sshd runs there"),
        (("no-such-host.invalid",), "Could not resolve hostname no-such-host.invalid"),
        (("-o", "NoSuchOption=1", "127.0.0.1"), "Bad configuration option: nosuchoption"),
        (("-J", "no-such-host.invalid", "127.0.0.1"), "Could not resolve hostname no-such-host.invalid"),
    ],
)
def test_a_host_that_is_not_there_is_told_from_one_without_our_tools(
    destination: tuple[str, ...], expected: str
) -> None:
    assert expected in complaint(Host("A", ("ssh", "-F", "none", *destination)))


def test_a_host_that_accepts_and_says_nothing_is_waited_for_only_so_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        shell = ("ssh", "-F", "none", "-p", str(silent.getsockname()[1]), "127.0.0.1")
        assert "timed out; see that the host is up" in complaint(Host("A", shell), 3.0)
        assert "no answer within 1 s" in complaint(Host("A", (*shell, "-o", "ConnectTimeout=60")), 1.0)


def test_who_is_kept_out_on_standard_output_reads_why(tmp_path: Path) -> None:
    why = "This account is currently not available."
    with sshd(tmp_path, f"ForceCommand echo {why}; exit 1") as server:
        host = Host("A", server.prefix)
        assert complaint(host).endswith(f"': {why}")

        async def start() -> None:
            async with Children() as children:
                await children.start("a thing", host, tmp_path / "log", ["true"])

        with pytest.raises(MigrationError, match=f"^a thing on A cannot be started: {re.escape(why)}$"):
            answer(start())


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        (("/no/ssh", "a"), "/no/ssh: No such file or directory; install that on this host"),
        (("ip", "netns", "exec", "no-such-namespace"), 'Cannot open network namespace "no-such-namespace"'),
        (("sh", "-c", "exit 3"), "there is no way to A by 'sh -c 'exit 3'': it ended with code 3"),
        (("nsenter", "-t", "4194304", "-n"), "nsenter: cannot open /proc/4194304/ns/net"),
        (
            ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sudo"),
            "sudo: a password is required; nobody can be asked for one here: allow the command without",
        ),
    ],
)
def test_other_prefixes_that_fail_are_repeated_too(shell: tuple[str, ...], expected: str) -> None:
    assert expected in complaint(Host("A", shell))


def test_a_child_behind_a_greeting_is_followed_to_its_end(server: Sshd) -> None:
    host = Host("A", server.prefix, str(NBDSERVE.parent))
    ready = server.directory / "ready"

    async def follow() -> str:
        async with Children() as children:
            words = ["sh", "-c", f"touch {ready}; echo the reason; exit 7"]
            child = await children.start("a thing", host, server.directory / "log", words, ready=ready)
            return await child.wait()

    assert answer(follow()) == "ended with code 7: the reason"


def test_a_supervisor_that_is_not_installed_is_named(server: Sshd) -> None:
    async def start() -> None:
        async with Children() as children:
            await children.start(
                "a thing", Host("A", server.prefix, "/no"), server.directory / "log", ["true"]
            )

    with pytest.raises(
        MigrationError, match="cannot be started: there is no /no/nbd-migrate on A; install it"
    ):
        answer(start())


def test_a_command_over_its_limit_is_ended_on_the_other_host(server: Sshd) -> None:
    mark = f"{server.directory}/sleeper"
    words = ("sh", "-c", "sleep 1000; :", mark)
    with pytest.raises(MigrationError, match=r"^sh on A: no end within 2 s$"):
        answer(Host("A", server.prefix).run(*words, limit=2.0))
    wait_until(lambda: not with_word(mark), "it ends")


def test_a_session_that_is_cut_in_the_middle_is_no_answer(server: Sshd) -> None:
    script = "kill -9 $(ps -o ppid= -p $(ps -o ppid= -p $PPID)); sleep 2"
    with pytest.raises(HostError, match=r"closed by remote host|was cut off"):
        answer(Host("A", server.prefix).run("sh", "-c", script, limit=LIMIT))


def test_an_ssh_that_stays_for_others_keeps_nobody_waiting(server: Sshd) -> None:
    control = server.directory / "control"
    shared = ("-o", "ControlMaster=auto", "-o", f"ControlPath={control}", "-o", "ControlPersist=60")
    host = Host("A", (*server.prefix, *shared))
    try:
        for _ in range(2):
            assert answer(host.run("echo", "in", limit=LIMIT)) == "in\n"
        assert control.is_socket()
    finally:
        run(*server.prefix, "-o", f"ControlPath={control}", "-O", "exit")


def test_what_the_operator_has_set_is_not_changed(server: Sshd, tmp_path: Path) -> None:
    def options(*given: str) -> tuple[str, ...]:
        words: tuple[str, ...] = answer(ssh.missing_options(("ssh", *given), 9.0))
        assert words[::2] == ("-o",) * (len(words) // 2)
        return words[1::2]

    every = ("BatchMode=yes", "ConnectTimeout=9", "ServerAliveInterval=5")
    assert options("-F", "none", "a") == every
    assert options("-F", "none", "-oConnectTimeout=1", "a", "-o", "ServerAliveInterval 2") == every[:1]
    config = tmp_path / "config"
    config.write_text("Host a\nConnectTimeout 3\nServerAliveInterval 7\nBatchMode yes\n")
    assert options("-F", str(config), "a") == ()
    assert options("-F", str(config), "b") == every
    assert answer(ssh.missing_options(("env", "ssh"), 9.0)) == ()
    assert answer(ssh.missing_options(("/no/ssh", "a"), 9.0)) == ()


def test_added_options_reach_ssh_and_not_the_command(server: Sshd) -> None:
    async def printed() -> str:
        host = await Host("A", (*server.prefix, "env", "-i")).prepared(9.0)
        assert host.options
        return await host.run("/usr/bin/env", "A=b", "/usr/bin/env", limit=LIMIT)

    assert "A=b" in answer(printed()).splitlines()


@pytest.fixture
def privileged() -> Iterator[tuple[str, ...]]:
    """A prefix with which others than root run what they cannot kill, as with sudo."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give it up")
    with short_directory() as directory:
        directory.chmod(0o755)
        program = directory / "setpriv"
        program.write_bytes(Path("/usr/bin/setpriv").read_bytes())
        program.chmod(stat.S_ISUID | 0o755)
        yield (str(program), "--reuid=0", "--regid=0", "--clear-groups")


def complaint_of_nobody(host: Host, *words: str) -> str:
    """What somebody without any rights reads when a command takes more than 2 s."""

    def body() -> str:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        ignored: list[str] = []
        sys.unraisablehook = lambda what: ignored.append(repr(what))
        try:
            answer(host.run(*words, limit=2.0))
        except MigrationError as error:
            gc.collect()
            return "\n".join([str(error), *ignored])
        return "it has ended"

    return in_a_child(body)


def test_a_command_with_the_rights_of_another_is_ended_all_the_same(privileged: tuple[str, ...]) -> None:
    mark = f"{privileged[0]} sleeper"
    said = complaint_of_nobody(Host("A", privileged), "sh", "-c", "sleep 1000; :", mark)
    assert said == "sh on A: no end within 2 s"
    wait_until(lambda: not with_word(mark), "it ends")


@pytest.mark.exhaustive
def test_a_prefix_that_hangs_and_cannot_be_killed_is_left(privileged: tuple[str, ...]) -> None:
    seconds = f"12.{os.getpid()}"
    said = complaint_of_nobody(Host("A", (*privileged, "sh", "-c", f"exec sleep {seconds}")), "true")
    assert re.fullmatch(rf"there is no way to A by '.*sleep {seconds}'': no answer within 2 s", said)
    wait_until(lambda: not with_word(seconds), "it ends", 20.0)


def in_a_child(body: Callable[[], str]) -> str:
    """What the body returns in a process of its own."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(theirs, body().encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as reader:
        said = reader.read().decode()
    os.waitpid(pid, 0)
    return said


def with_word(word: str) -> list[psutil.Process]:
    """Processes with this word on their command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if word in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_quoting_is_a_shells(server: Sshd) -> None:
    """The words for one ssh are one word for its shell."""
    argv = Host("A", ("ssh", "a")).argv(["printf", "%s", AWKWARD])
    assert argv[:2] == ["ssh", "a"]
    assert shlex.split(argv[2]) == ["printf", "%s", AWKWARD]
