"""Who has the guest when A's QEMU, or only the connection to it, is gone: what the way back makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nbdserve.common.errors import ConnectError
from nbdserve.qmp.client import UnreachableError
from recipes.commands import retreat
from recipes.commands.retreat import OwnHands
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate import watch, way_back
from recipes.migrate.decide import Action, Wish
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import but
from recipes.migrate.progress import Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Process, Role
from recipes.migrate.watch import Orders, Watch
from recipes.migrate.way_back import Verdict, WayBack
from recipes.qemu import destination
from recipes.qemu.facts import OnB
from recipes.qemu.vm import EndedVm, Vm, VmGoneError, VmSilentError, connect, nobody_listens
from tests.support.journals import begun
from tests.support.processes import dying_with_parent


class Answering:
    """B's QEMU, which says each of these of its state, the last one for ever; "" is silence."""

    connected = True

    def __init__(self, *states: str) -> None:
        self._states = list(states)

    async def execute(self, command: str, **options: object) -> dict[str, object]:
        assert command == "query-status"
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if not state:
            raise VmSilentError("B's QEMU did not answer query-status within 1 s")
        return {"status": state, "running": state == "running"}


class Alone(Migration):
    """A migration whose processes are nobody's."""

    def __init__(self, journal: Journal, a: Vm, b: Vm | None) -> None:
        self.journal, self.a, self.b = journal, a, b
        self.owned, self.guest_end, self.unattended = True, None, False
        self.report = Report()
        self.host_a, self.host_b = Host("A"), Host("B")
        self._started = {}


def without_source(directory: Path, *states: str) -> Migration:
    """A migration in whose switch-over A's QEMU has ended."""
    journal = begun(directory, str(directory / "a.qmp"), Phase.SWITCH_OVER)
    return Alone(journal, EndedVm("A's QEMU"), cast(Vm, Answering(*states)))


def verdict_of(m: Migration) -> Verdict:
    way = WayBack(OwnHands(m), m.state, wish=Wish.GO_BACK, grace=0.0)
    return asyncio.run(way.go())


def back(m: Migration) -> str:
    """Where the guest is; nothing when it is on B."""
    verdict = verdict_of(m)
    return "" if verdict.action is Action.KEEP_B else verdict.where


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way_back, "ARRIVE", 0.3)


@pytest.mark.parametrize("state", ["running", "io-error", "paused", "shutdown"])
def test_a_guest_that_is_on_b_is_kept_there_whatever_it_does(tmp_path: Path, state: str) -> None:
    """With A's host the export may have gone, too: then the guest waits on B, and is on no other host."""
    assert back(without_source(tmp_path, "inmigrate", state)) == ""


def test_a_b_that_is_silent_may_have_the_guest(tmp_path: Path) -> None:
    assert "A's QEMU has ended, and B's does not answer" in back(without_source(tmp_path, "inmigrate", ""))


def test_a_guest_of_which_b_waits_for_the_rest_has_gone_with_a(tmp_path: Path) -> None:
    assert "A's QEMU is gone and with it the guest" in back(without_source(tmp_path, "inmigrate"))


def test_only_a_refusal_says_that_there_is_no_qemu(tmp_path: Path) -> None:
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    mute = tmp_path / "mute"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(mute))
        server.listen()
        addresses = {
            str(tmp_path / "none"): True,
            f"127.0.0.1:{port}": True,
            # A name with two addresses, as a rule.
            f"localhost:{port}": True,
            str(mute): False,
            # No connection can be made to this.
            "255.255.255.255:4000": False,
        }
        for address, ended in addresses.items():
            with pytest.raises(ConnectError) as failure:
                asyncio.run(connect("A's QEMU", address, limit=0.3, command_limit=0.3))
            assert nobody_listens(failure.value) == ended, address


def unreachable(*given: object, **others: object) -> Any:
    """What connecting to a host says that is away."""
    lost = UnreachableError("no monitor", "No route to host", nobody_listens=False)
    raise ConnectError("no monitor at 192.0.2.1:4000: No route to host") from lost


def test_hosts_that_are_away_may_have_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.qemu.vm.connect", unreachable)
    found = asyncio.run(destination.look("192.0.2.1:4000", 0.1))
    assert found is OnB.SILENT
    journal = begun(tmp_path, "192.0.2.1:4000", Phase.SWITCH_OVER, "192.0.2.2:4000")
    there = Watch(Orders(str(journal.directory), journal.fd, journal.lock.fd, owned=False))
    there.children.append(watch.Watched("B's QEMU", 1 << 20, 1 << 20))
    monkeypatch.setattr(there, "release_children", lambda: None)
    with pytest.raises(MigrationError, match=r"it is not known where the guest is: .*; nothing was ended"):
        asyncio.run(there.act())


def test_a_source_that_falls_silent_leaves_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*given: object, **others: object) -> Vm:
        class Silent:
            connected = True

            async def execute(self, command: str, **arguments: object) -> object:
                raise VmSilentError(f"A's QEMU did not answer {command} within 0.1 s")

            async def disconnect(self) -> None:
                pass

        return cast(Vm, Silent())

    async def silent_too(address: str, limit: float) -> OnB:
        return OnB.SILENT

    monkeypatch.setattr(watch, "connect_again", silent)
    monkeypatch.setattr(watch, "look", silent_too)
    journal = begun(tmp_path, "/a", Phase.SWITCH_OVER)
    there = Watch(Orders(str(journal.directory), journal.fd, journal.lock.fd, owned=False))
    there.children.append(watch.Watched("B's QEMU", 1 << 20, 1 << 20))
    released: list[bool] = []
    monkeypatch.setattr(there, "release_children", lambda: released.append(True))
    with pytest.raises(MigrationError, match="it is not known where the guest is: A's QEMU did not answer"):
        asyncio.run(there.act())
    assert released


class Living:
    """A's QEMU, in which the guest runs."""

    connected = True

    async def execute(self, command: str, **arguments: object) -> object:
        return {"query-migrate": {}, "query-status": {"status": "running", "running": True}}.get(command)


class Ending(Living):
    """A's QEMU, which ends just when it is spoken to."""

    connected = True
    shut_down = None

    async def execute(self, command: str, **arguments: object) -> object:
        self.connected = False
        raise VmGoneError("A's QEMU has ended")

    async def gone(self) -> None:
        pass


def test_a_source_that_ends_while_it_is_asked_has_ended(tmp_path: Path) -> None:
    m = without_source(tmp_path, "inmigrate")
    m.a = cast(Vm, Ending())
    assert "A's QEMU is gone and with it the guest" in back(m)
    m = without_source(tmp_path, "inmigrate", "running")
    m.a = cast(Vm, Ending())
    assert back(m) == ""


@pytest.mark.parametrize("away", [False, True])
def test_a_source_whose_connection_was_lost_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    async def again(*given: object, **others: object) -> Vm:
        if away:
            unreachable()
        return cast(Vm, Living())

    monkeypatch.setattr(retreat, "connect_again", again)
    m = without_source(tmp_path, "inmigrate")
    m.enter(Phase.LAUNCH)
    where = back(m)
    if away:
        assert where.startswith("the guest was left on A, but look at it: no monitor at 192.0.2.1:4000")
        m.enter(Phase.SWITCH_OVER)
        assert back(m) == "it is not known where the guest is: no monitor at 192.0.2.1:4000: No route to host"
        # What its QEMU may still serve is not forgotten.
        m.enter(Phase.LAUNCH, exporter=str(tmp_path / "a.export"))
        assert f"may still serve its disks in {tmp_path / 'a.export'} (no monitor at " in back(m)
        assert m.state.exporter
    else:
        assert where.startswith("the guest runs on A as before; but its QEMU's monitor had hung up")


def test_what_is_left_is_told_once() -> None:
    assert but("the guest runs on A as before", "B is away", "B is away") == (
        "the guest runs on A as before; but B is away"
    )


class Standing(Living):
    """A's QEMU, whose guest has shut down (``-no-shutdown``), or was paused by somebody."""

    def __init__(self, state: str) -> None:
        self._state = state

    async def execute(self, command: str, **arguments: object) -> object:
        assert command != "cont", "it would be refused, for as long as that is tried, or is nobody's wish"
        return {"query-migrate": {}, "query-status": {"status": self._state, "running": False}}.get(command)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("shutdown", "the guest does not run there: it is in state shutdown"),
        ("paused", "the guest is paused there, as it was"),
    ],
)
def test_a_guest_that_does_not_run_on_a_is_there_as_it_is(tmp_path: Path, state: str, words: str) -> None:
    m = without_source(tmp_path, "inmigrate")
    m.a = cast(Vm, Standing(state))
    m.enter(Phase.MIGRATE)
    assert back(m) == f"the guest runs on A as before; but {words}"
    assert m.state.over


def test_a_source_that_was_not_seen_to_end_is_not_written_off(tmp_path: Path) -> None:
    """Nobody listens at its address; the way there may be lost, and the guest stand still behind it."""
    m = without_source(tmp_path, "inmigrate")
    assert f"and then: nbd-migrate abort {m.state.name}" in back(m)
    assert m.state.phase is Phase.SWITCH_OVER
    assert m.state.gives_way


@contextlib.contextmanager
def watching(directory: Path, *processes: Process) -> Iterator[Watch]:
    """A guard whose command was killed in the switch-over; nobody listens at either monitor."""
    journal = begun(directory, str(directory / "a.qmp"), Phase.SWITCH_OVER, str(directory / "b.qmp"))
    assert journal.state
    there = dataclasses.replace(journal.state.plan.destination, image=str(directory / "b.raw"))
    limits = dataclasses.replace(journal.state.plan.limits, command=60.0)
    plan = dataclasses.replace(journal.state.plan, destination=there, limits=limits)
    disks = tuple(dataclasses.replace(disk, target=there.image) for disk in journal.state.disks)
    made = (there.image, f"{there.image}.map")
    journal.append(dataclasses.replace(journal.state, plan=plan, disks=disks, processes=processes, made=made))
    found = Watch(Orders(str(journal.directory), journal.fd, journal.lock.fd, owned=False))
    (directory / "b.raw").write_bytes(b"guest" * 1024)
    yield found
    assert (directory / "b.raw").exists()


def test_a_guard_does_not_take_an_address_for_a_qemus_death(tmp_path: Path) -> None:
    argv = [*dying_with_parent(signal.SIGKILL), "sh", "-c", "read -r end", "its.mark"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as b:
        with (
            watching(tmp_path, Process(Role.QEMU, b.pid, "its.mark")) as there,
            pytest.raises(MigrationError, match="B's QEMU is there, but nobody listens at its monitor"),
        ):
            asyncio.run(there.act())
        assert b.poll() is None
        b.communicate(b"\n", timeout=60.0)


def test_a_guard_does_not_remove_what_a_guest_has_written_on_b(tmp_path: Path) -> None:
    with watching(tmp_path) as there:
        assert "the guest has stopped; its disk is" in asyncio.run(there.act())
    assert there.state.phase is Phase.ARRIVED
    assert there.state.made == ()
