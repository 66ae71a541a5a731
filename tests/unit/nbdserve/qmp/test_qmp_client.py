"""A monitor's client: every wait has a limit, ends with the other side, and takes nothing with it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from qemu.qmp import Runstate
from qemu.qmp.message import Message

from nbdserve.qmp.client import (
    EventListener,
    GoneError,
    MonitorClient,
    MonitorError,
    QueuedError,
    RefusedError,
    SilentError,
    UnreachableError,
    connect,
)
from tests.support.processes import PATIENCE
from tests.support.scripted import Peer, full, scripted

LIMIT = 10.0 * PATIENCE
"""Seconds after which a test gives up."""
SHORT = 0.05
"""Seconds of a wait that is to be in vain."""


def converse(
    directory: Path, talk: Callable[[Peer], Awaitable[None]], use: Callable[[MonitorClient], Awaitable[None]]
) -> None:
    """Connect to a monitor that talks like this, once it has greeted, and use the connection.

    Nothing that went wrong may be left for the event loop to complain of.
    """
    complaints: list[object] = []

    async def greeted(peer: Peer) -> None:
        await peer.greet()
        await talk(peer)

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        path = directory / "monitor"
        async with asyncio.timeout(LIMIT), scripted(path, greeted):
            client = await connect(str(path), name="A", limit=LIMIT)
            try:
                await use(client)
            finally:
                await client.close(limit=LIMIT)
        del client
        gc.collect()

    asyncio.run(body())
    assert not complaints


class Bare:
    """A connected connection, whose one command is answered, and that ends, when the test says so."""

    runstate = Runstate.RUNNING

    def __init__(self) -> None:
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()

    async def execute(self, command: str, arguments: object) -> object:
        return await asyncio.shield(self.answer)

    async def runstate_changed(self) -> None:
        await self._ended.wait()

    def end(self) -> None:
        self.runstate = Runstate.DISCONNECTING
        self._ended.set()


def bare() -> tuple[MonitorClient, Bare]:
    connection = Bare()
    return MonitorClient("A", cast(Any, connection)), connection


# Commands.


def test_a_command_returns_its_value_and_a_refusal_its_reason(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.answer(**{"return": {"status": "running"}})
        await peer.answer(error={"class": "GenericError", "desc": "not now"})
        await peer.hung_up()

    async def use(client: MonitorClient) -> None:
        assert await client.execute("query-status", {}, limit=LIMIT) == {"status": "running"}
        with pytest.raises(RefusedError, match=r"^A refused stop: not now$") as refused:
            await client.execute("stop", {}, limit=LIMIT)
        assert refused.value.reason == "not now"

    converse(tmp_path, talk, use)


def test_a_command_ends_with_the_other_side_and_so_does_every_one_after_it(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.command()
        peer.hang_up()

    async def use(client: MonitorClient) -> None:
        for _ in range(2):
            with pytest.raises(GoneError, match=r"^A has ended$"):
                await client.execute("stop", {}, limit=LIMIT)
        await client.gone()
        assert not client.connected

    converse(tmp_path, talk, use)


def test_a_command_that_is_not_answered_ends_with_its_limit_and_the_next_is_answered(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        late = await peer.command()
        command = await peer.command()
        peer.send({"id": late["id"], "return": "late"}, {"id": command["id"], "return": "in time"})
        await peer.hung_up()

    async def use(client: MonitorClient) -> None:
        with pytest.raises(SilentError, match=r"^A did not answer stop within 0\.05 s$"):
            await client.execute("stop", {}, limit=SHORT)
        assert client.connected
        assert await client.execute("query-status", {}, limit=LIMIT) == "in time"

    converse(tmp_path, talk, use)


@pytest.mark.parametrize("reply", [{}, {"error": 3}, {"error": {"class": "GenericError"}}])
def test_an_answer_that_is_none_is_told_as_such(tmp_path: Path, reply: dict[str, object]) -> None:
    async def talk(peer: Peer) -> None:
        await peer.answer(**reply)
        await peer.hung_up()

    async def use(client: MonitorClient) -> None:
        with pytest.raises(MonitorError, match=r"^A answered stop with what is no reply of QMP's$"):
            await client.execute("stop", {}, limit=LIMIT)

    converse(tmp_path, talk, use)


@pytest.mark.parametrize("steps", range(5))
def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(steps: int) -> None:
    async def body() -> None:
        client, connection = bare()
        task = asyncio.create_task(client.execute("query-status", {}, limit=5.0))
        await asyncio.sleep(0.01)
        connection.answer.set_result({})
        # The answer travels one step of the loop at a time.
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(body())


# Events.


def test_what_came_before_the_other_side_ended_is_told_before_that(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.answer(**{"return": {}})
        peer.send({"event": "STOP"}, {"event": "RESUME"}, {"event": "STOP", "data": {"last": True}})
        peer.hang_up()

    async def use(client: MonitorClient) -> None:
        with client.events("STOP") as listener:
            await client.execute("stop", {}, limit=LIMIT)
            await client.gone()
            assert await client.next_event(listener, limit=LIMIT) == {"event": "STOP"}
            assert await client.next_event(listener, limit=LIMIT) == {"event": "STOP", "last": True}
            for _ in range(2):
                with pytest.raises(GoneError, match=r"^A has ended$"):
                    await client.next_event(listener, limit=LIMIT)

    converse(tmp_path, talk, use)


def test_a_wait_without_limit_ends_with_the_other_side(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.command()
        peer.hang_up()

    async def use(client: MonitorClient) -> None:
        with client.events("STOP") as listener:
            waiting = asyncio.create_task(client.next_event(listener, limit=float("inf")))
            with pytest.raises(GoneError):
                await client.execute("quit", {}, limit=LIMIT)
            with pytest.raises(GoneError):
                await waiting

    converse(tmp_path, talk, use)


def test_a_wait_in_vain_says_what_did_not_happen() -> None:
    async def body() -> None:
        client, _ = bare()
        with pytest.raises(SilentError, match=r"^A: the end did not happen within 0\.05 s$"):
            await client.next_event(EventListener("STOP"), limit=SHORT, what="the end")

    asyncio.run(body())


@pytest.mark.parametrize("steps", range(5))
def test_a_wait_that_is_cancelled_takes_no_event_with_it(steps: int) -> None:
    async def body() -> None:
        client, _ = bare()
        listener = EventListener("STOP")
        task = asyncio.create_task(client.next_event(listener, limit=LIMIT))
        await asyncio.sleep(0.01)
        await listener.put(Message({"event": "STOP"}))
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await client.next_event(listener, limit=LIMIT) == {"event": "STOP"}
        else:
            assert task.result() == {"event": "STOP"}

    asyncio.run(body())


@pytest.mark.parametrize("steps", range(5))
def test_an_event_that_comes_together_with_the_limit_is_told_then_or_later(steps: int) -> None:
    async def body() -> None:
        client, _ = bare()
        listener = EventListener("STOP")
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(client.next_event(listener, limit=SHORT))
        await asyncio.sleep(0)
        # The timers of the loop are looked at again after this, when the limit is over, too.
        until = loop.time() + 2 * SHORT
        while loop.time() < until:
            pass
        for _ in range(steps):
            await asyncio.sleep(0)
        await listener.put(Message({"event": "STOP"}))
        try:
            event = await task
        except SilentError:
            event = await client.next_event(listener, limit=LIMIT)
        assert event == {"event": "STOP"}

    asyncio.run(body())


@pytest.mark.parametrize("steps", range(6))
def test_an_event_that_comes_together_with_the_end_is_told(steps: int) -> None:
    async def body() -> None:
        client, connection = bare()
        listener = EventListener("STOP")
        task = asyncio.create_task(client.next_event(listener, limit=LIMIT))
        await asyncio.sleep(0.01)
        connection.end()
        # The end travels one step of the loop at a time.
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.done():
            with pytest.raises(GoneError):
                task.result()
            return
        await listener.put(Message({"event": "STOP"}))
        assert await task == {"event": "STOP"}
        with pytest.raises(GoneError):
            await client.next_event(listener, limit=LIMIT)

    asyncio.run(body())


def test_events_are_heard_from_the_very_beginning_and_kept_only_for_who_listens(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.greet()
        peer.send({"event": "SHUTDOWN"}, *[{"event": "STOP"}] * 1000)
        await peer.answer(**{"return": {}})
        await peer.hung_up()

    async def body() -> None:
        path, listener = tmp_path / "monitor", EventListener("SHUTDOWN")
        async with asyncio.timeout(LIMIT), scripted(path, talk):
            client = await connect(str(path), name="A", limit=LIMIT, listeners=[listener])
            await client.execute("query-status", {}, limit=LIMIT)
            assert [event["event"] for event in listener.history] == ["SHUTDOWN"]
            everything = client._connection.events
            assert everything.history == ()
            assert everything.empty()
            await client.close(limit=LIMIT)

    asyncio.run(body())


# The end.


def test_who_waits_for_the_end_is_told_of_it_when_the_connection_is_closed_here(tmp_path: Path) -> None:
    async def use(client: MonitorClient) -> None:
        waiting = asyncio.create_task(client.gone())
        await asyncio.sleep(0)
        await client.close(limit=LIMIT)
        await waiting
        assert not client.connected

    converse(tmp_path, Peer.hung_up, use)


@pytest.mark.parametrize("garbage", [(), ("garbage",), ({"event": 3, "error": {}}, [])])
def test_who_ends_right_after_the_negotiation_is_gone(tmp_path: Path, garbage: tuple[object, ...]) -> None:
    async def talk(peer: Peer) -> None:
        peer.send(*garbage)
        if not garbage:
            peer.hang_up()
        await peer.hung_up()

    async def use(client: MonitorClient) -> None:
        await client.gone()
        with pytest.raises(GoneError, match=r"^A has ended$"):
            await client.execute("query-status", {}, limit=LIMIT)

    converse(tmp_path, talk, use)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_connection_whose_other_side_takes_nothing_is_cut_off(tmp_path: Path, cancelled: bool) -> None:
    async def talk(peer: Peer) -> None:
        await deaf.wait()
        await peer.hung_up()

    async def use(client: MonitorClient) -> None:
        others = asyncio.all_tasks()
        with pytest.raises(SilentError):
            # More than the buffers of a socket hold.
            await client.execute("stop", {"why": "x" * (1 << 24)}, limit=SHORT)
        if cancelled:
            leaving = asyncio.create_task(client.close(limit=LIMIT))
            await asyncio.sleep(SHORT)
            assert leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        else:
            await client.close(limit=SHORT)
        assert not client.connected
        # Nothing goes on in the background.
        assert asyncio.all_tasks() < others
        deaf.set()

    deaf = asyncio.Event()
    converse(tmp_path, talk, use)


# Connecting.


def test_who_accepts_and_says_nothing_is_given_up_and_the_connection_closed(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "monitor"
        async with asyncio.timeout(LIMIT), scripted(path, Peer.hung_up):
            with pytest.raises(SilentError, match=r"^A did not answer within 0\.05 s$"):
                await connect(str(path), name="A", limit=SHORT)

    asyncio.run(body())


@pytest.mark.parametrize("greeting", ["garbage", "[]", '{"QMP": 3}', "{}", ""])
def test_what_greets_otherwise_is_no_monitor_and_that_takes_one_line(tmp_path: Path, greeting: str) -> None:
    async def talk(peer: Peer) -> None:
        peer.send(greeting)
        await peer.hung_up()

    async def body() -> None:
        path = tmp_path / "monitor"
        async with asyncio.timeout(LIMIT), scripted(path, talk):
            with pytest.raises(UnreachableError, match=r"^A: no monitor: .+") as failure:
                await connect(str(path), name="A", limit=LIMIT)
        assert "\n" not in str(failure.value)
        assert not failure.value.nobody_listens

    asyncio.run(body())


def refused(address: str | tuple[str, int]) -> UnreachableError:
    with pytest.raises(UnreachableError) as failure:
        asyncio.run(connect(address, name="A", limit=LIMIT))
    return failure.value


def test_where_nobody_listens_there_is_no_monitor_for_sure(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "none")).nobody_listens
    assert str(refused(str(tmp_path / "none"))) == f"A: no monitor: {os.strerror(errno.ENOENT)}"
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(tmp_path / "closed"))
    assert refused(str(tmp_path / "closed")).nobody_listens
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        # A name with two addresses, as a rule.
        for host in ("127.0.0.1", "localhost"):
            error = refused((host, port))
            assert error.nobody_listens
            assert error.reason == os.strerror(errno.ECONNREFUSED)


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)),
        OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)),
        OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 113] Connect call failed"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    ],
    ids=["unreachable", "timed out", "one of two", "unknown"],
)
def test_who_is_away_may_be_there(monkeypatch: pytest.MonkeyPatch, cause: OSError) -> None:
    async def away(*given: object, **others: object) -> None:
        raise cause

    monkeypatch.setattr(asyncio, "open_connection", away)
    error = refused(("192.0.2.1", 4000))
    assert not error.nobody_listens
    assert error.reason == cause.strerror or error.reason == str(cause)


def test_a_queue_that_is_full_is_said_to_be(tmp_path: Path) -> None:
    waiting = full(tmp_path / "monitor")
    try:
        with pytest.raises(QueuedError, match=r"A lets nobody in within 0\.05 s: its queue is full"):
            asyncio.run(connect(str(tmp_path / "monitor"), name="A", limit=SHORT))
    finally:
        for each in waiting:
            each.close()


def test_a_place_in_the_queue_is_waited_for(tmp_path: Path) -> None:
    listening, *waiting = full(tmp_path / "monitor")

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        for _ in waiting:
            (await loop.sock_accept(listening))[0].close()
        accepted, _ = await loop.sock_accept(listening)
        reader, writer = await asyncio.open_unix_connection(sock=accepted)
        await Peer(reader, writer).greet()
        await Peer(reader, writer).hung_up()
        writer.close()

    async def body() -> None:
        async with asyncio.timeout(LIMIT):
            connecting = asyncio.create_task(connect(str(tmp_path / "monitor"), name="A", limit=LIMIT))
            await asyncio.sleep(0)
            answering = asyncio.create_task(answer())
            client = await connecting
            await client.close(limit=LIMIT)
            await answering

    try:
        asyncio.run(body())
    finally:
        for each in (listening, *waiting):
            each.close()
