"""One ssh connection to a host, for everything; and monitors that only the host can see."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nbdserve.common import clock
from nbdserve.common.errors import ConnectError
from recipes.connections import sharing as module
from recipes.connections.installed import check_version, find_commands
from recipes.connections.monitors import MonitorAt, monitor_of
from recipes.connections.sharing import PREFIX, Sharing, sharing
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.qemu.vm import VmGoneError, connect, connect_again, nobody_listens
from tests.support.guests import short_directory
from tests.support.processes import Process, run, wait_until
from tests.support.servers import NBDSERVE, free_tcp_address
from tests.support.sshd import Sshd, sshd

LIMIT = 120.0
WAITED = 25.0
"""Seconds for what is waited for in vain, in which a busy machine gets as far as that."""
TOOLS = str(Path(NBDSERVE).parent)
GREETING = (
    "ForceCommand echo 'Welcome to {here}'; printf 'no end of the line'; eval \"$SSH_ORIGINAL_COMMAND\""
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    """A server that greets, and forwards nothing."""
    with sshd(tmp_path, GREETING, "AllowTcpForwarding no", "AllowStreamLocalForwarding no") as made:
        yield made


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sockets of connections are."""
    with short_directory() as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield directory


def host_of(server: Sshd) -> Host:
    """The host behind it."""
    return Host("A", server.prefix, TOOLS, address="ssh://a")


def with_host(server: Sshd, body: Callable[[Host], Awaitable[object]]) -> None:
    """Do something with a host to which a connection is shared."""

    async def main() -> None:
        async with sharing(host_of(server)) as (host,):
            await body(host)

    clock.run(main())


def connections(server: Sshd) -> int:
    """How often somebody has been let in."""
    return (server.directory / "sshd.log").read_text().count("Accepted publickey")


def keepers(runtime: Path) -> list[psutil.Process]:
    """The processes that keep the connections."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if str(runtime) in (line := " ".join(each.info["cmdline"] or []))
            and "[mux]" in line]  # fmt: skip


def nothing_is_left(runtime: Path) -> None:
    wait_until(lambda: not keepers(runtime), "the connection is closed")
    assert list(runtime.iterdir()) == []


def test_commands_share_one_connection_that_ends_with_the_block(server: Sshd, runtime: Path) -> None:
    async def body(host: Host) -> None:
        await host.run("true", limit=LIMIT)
        said = await asyncio.gather(*(host.run("echo", f"{n}", limit=LIMIT) for n in range(5)))
        assert said == [f"{n}\n" for n in range(5)]
        [directory] = runtime.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        assert len(keepers(runtime)) == 1

    with_host(server, body)
    assert connections(server) == 1
    nothing_is_left(runtime)


def test_the_connection_ends_also_after_a_failure(server: Sshd, runtime: Path) -> None:
    async def body(host: Host) -> None:
        await host.run("true", limit=LIMIT)
        await host.run("false", limit=LIMIT)

    with pytest.raises(MigrationError, match=r"^false on A: exit code 1$"):
        with_host(server, body)
    nothing_is_left(runtime)


def test_a_connection_that_is_lost_is_made_again(server: Sshd, runtime: Path) -> None:
    async def body(host: Host) -> None:
        for _ in range(2):
            await host.run("true", limit=LIMIT)
            [keeper] = keepers(runtime)
            keeper.kill()
            wait_until(lambda: not keepers(runtime), "it is dead")
        await host.run("true", limit=LIMIT)
        await host.run("true", limit=LIMIT)
        assert len(keepers(runtime)) == 1

    with_host(server, body)
    assert connections(server) == 3
    nothing_is_left(runtime)


def test_a_command_whose_connection_is_killed_fails_in_one_line(server: Sshd, runtime: Path) -> None:
    async def body(host: Host) -> None:
        await host.run("true", limit=LIMIT)
        waiting = asyncio.create_task(host.run("sleep", "5", limit=LIMIT))
        await asyncio.sleep(0.5)
        keepers(runtime)[0].kill()
        with pytest.raises(
            MigrationError, match=r"^there is no way to A by .*(was cut off|code 255)$"
        ) as caught:
            await waiting
        assert "\n" not in str(caught.value)

    with_host(server, body)


def test_a_host_that_allows_one_session_only_is_used_all_the_same(tmp_path: Path, runtime: Path) -> None:
    async def body(host: Host) -> None:
        await host.run("true", limit=LIMIT)
        said = await asyncio.gather(*(host.run("echo", f"{n}", limit=LIMIT) for n in range(3)))
        assert said == [f"{n}\n" for n in range(3)]

    with sshd(tmp_path, "MaxSessions 1") as server:
        with_host(server, body)
    nothing_is_left(runtime)


def test_a_connection_that_everybody_has_left_closes_itself(
    server: Sshd, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PERSIST", 1)
    pid = os.fork()
    if not pid:
        try:

            async def body(host: Host) -> None:
                await host.run("true", limit=LIMIT)
                os.kill(os.getpid(), signal.SIGKILL)

            with_host(server, body)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert list(runtime.iterdir())
    wait_until(lambda: not keepers(runtime), "the connection is closed")
    # The next one removes what is left.
    with_host(server, lambda host: host.run("true", limit=LIMIT))
    nothing_is_left(runtime)


def test_who_is_alive_keeps_his_directory(server: Sshd, runtime: Path) -> None:
    async def body(host: Host) -> None:
        other = Sharing.begin()
        assert len(list(runtime.iterdir())) == 2
        await other.end(())
        await host.run("true", limit=LIMIT)

    with_host(server, body)
    (runtime / f"{PREFIX}file").touch()
    with_host(server, lambda host: host.run("true", limit=LIMIT))
    assert [each.name for each in runtime.iterdir()] == [f"{PREFIX}file"]


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Path]:
    """A monitor of QEMU's protocol."""
    image, path = tmp_path / "disk.raw", tmp_path / "monitor"
    image.write_bytes(bytes(4096))
    address = tmp_path / "nbd"
    with Process(
        [NBDSERVE, "-f", "raw", "-k", address, "--qmp", f"unix:{path}", image], tmp_path / "nbdserve.log"
    ) as served:
        served.wait_for(path.exists, "the monitor")
        yield path


def test_a_monitor_is_reached_over_the_shared_connection(server: Sshd, runtime: Path, monitor: Path) -> None:
    async def body(host: Host) -> None:
        for _ in range(2):
            vm = await connect("it", monitor_of(host, str(monitor)), limit=LIMIT, command_limit=LIMIT)
            assert {"name": "quit"} in await vm.execute("query-commands")
            await vm.disconnect()
        assert connections(server) == 1

    with_host(server, body)
    nothing_is_left(runtime)


def test_who_is_not_at_a_monitor_is_told_from_a_way_that_is_lost(server: Sshd, tmp_path: Path) -> None:
    async def complaint(host: Host, address: str) -> ConnectError:
        with pytest.raises(ConnectError) as caught:
            await connect("it", monitor_of(host, address), limit=LIMIT, command_limit=LIMIT)
        assert "\n" not in str(caught.value)
        return caught.value

    nobody = f"127.0.0.1:{free_tcp_address().port}"

    async def body(host: Host) -> None:
        for address, why in ((str(tmp_path / "none"), "No such file"), (nobody, "Connection refused")):
            error = await complaint(host, address)
            assert str(error).startswith(f"it: no monitor at {address} on A: {why}")
            assert nobody_listens(error)
            assert (
                await connect_again("it", MonitorAt(address, host), limit=LIMIT, command_limit=LIMIT) is None
            )

    with_host(server, body)
    away = Host("A", ("ssh", "-p", "1", "-F", "none", "127.0.0.1"), TOOLS, address="ssh://a")
    error = clock.run(complaint(away, nobody))
    assert not nobody_listens(error)
    assert "Connection refused; see that sshd runs there" in str(error)


def test_a_monitor_whose_way_is_cut_is_gone_and_can_be_reached_again(
    server: Sshd, runtime: Path, monitor: Path
) -> None:
    async def body(host: Host) -> None:
        vm = await connect("it", monitor_of(host, str(monitor)), limit=LIMIT, command_limit=LIMIT)
        keepers(runtime)[0].kill()
        await vm.gone()
        with pytest.raises(VmGoneError):
            await vm.execute("query-commands")
        await vm.disconnect()
        again = await connect_again("it", monitor_of(host, str(monitor)), limit=LIMIT, command_limit=LIMIT)
        assert again
        await again.disconnect()

    with_host(server, body)


@pytest.mark.exhaustive
def test_a_monitor_that_says_nothing_is_told_of_as_on_this_machine(server: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        async def body(host: Host) -> None:
            with pytest.raises(ConnectError, match="is another client connected to it") as caught:
                await connect("it", monitor_of(host, str(path)), limit=WAITED, command_limit=LIMIT)
            assert not nobody_listens(caught.value)

        with_host(server, body)


@pytest.mark.exhaustive
def test_a_monitor_that_lets_nobody_in_is_told_of_as_on_this_machine(server: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))

        async def body(host: Host) -> None:
            await host.run("true", limit=LIMIT)
            with pytest.raises(ConnectError, match=r"lets nobody in within 25 s, as others wait") as caught:
                await connect("it", monitor_of(host, str(path)), limit=WAITED, command_limit=LIMIT)
            assert not nobody_listens(caught.value)

        with_host(server, body)


def test_this_project_is_found_on_a_host_and_another_version_refused(server: Sshd, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "nbdserve").write_text("#!/bin/sh\necho nbdserve 99.0\n")
    (other / "nbdserve").chmod(0o755)

    async def body(host: Host) -> None:
        assert await find_commands(host, "source.bin", LIMIT) == TOOLS
        await check_version(host, LIMIT)

    with_host(server, body)
    strange = Host("A", server.prefix, str(other), address="ssh://a")
    with pytest.raises(MigrationError, match=r"^.*other/nbdserve on A is of version 99.0, and this is "):
        clock.run(check_version(strange, LIMIT))


def test_the_bridge_says_what_it_needs() -> None:
    done = run(Path(TOOLS) / "nbd-migrate", "bridge")
    assert (done.returncode, done.stderr) == (
        2,
        "nbd-migrate: bridge needs MONITOR: see nbd-migrate --help\n",
    )
