"""Exports of a shelf: opened once for all who use them, and without keeping anybody else waiting."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from nbdserve.common.errors import ConnectionLostError, OperatorError, ProtocolError
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.offers import Offer
from nbdserve.transmission.traffic import Traffic
from tests.support.memory import MemoryBackend
from tests.support.processes import wait_until

SIZE = 4096


class Disk(MemoryBackend):
    """A disk that is known to be open or not."""

    def __init__(self, shelf: Shelf, size: int) -> None:
        super().__init__(size)
        self._shelf = shelf
        shelf.disks.add(self)

    def close(self) -> None:
        """It is closed once."""
        self._shelf.disks.remove(self)


class Shelf:
    """Disks of any name but ``none``; those whose name begins with ``slow`` wait until ``gate`` opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.disks: set[Disk] = set()
        self.opened = 0
        self.waiting = 0
        self.failure: Exception | None = None
        self.size = SIZE

    def names(self) -> list[str]:
        """None of interest."""
        return ["fast", "slow"]

    def offer(self, name: str) -> Offer | None:
        """What is said of a disk, at once."""
        return Export(name, MemoryBackend(SIZE)).offer

    def open(self, name: str) -> Export | None:
        """A disk, in its time."""
        self.opened += 1
        if name.startswith("slow"):
            self.waiting += 1
            assert self.gate.wait(60), "nobody has opened the gate"
            self.waiting -= 1
        if self.failure is not None:
            raise self.failure
        return None if name == "none" else Export(name, Disk(self, self.size))


class User:
    """Somebody who uses exports."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def cut(self, reason: str) -> bool:
        """Nothing to cut."""
        return True


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    """A shelf on which nothing is left open in the end."""
    shelf = Shelf()
    yield shelf
    shelf.gate.set()
    wait_until(lambda: not shelf.disks, "every disk is closed")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def entering(
    pool: ThreadPoolExecutor, exports: Exports, name: str, users: list[User]
) -> list[Future[Export]]:
    """All of them enter at once."""
    offer = exports.offer(name)
    assert offer is not None
    found = [pool.submit(exports.enter, offer, user) for user in users]
    wait_until(lambda: len(exports._expected.get(name, ())) == len(users), "all of them wait")
    return found


def test_clients_that_come_while_it_is_opened_share_one_export(
    shelf: Shelf, pool: ThreadPoolExecutor
) -> None:
    exports = Exports(shelf=shelf)
    users = [User() for _ in range(8)]
    found = entering(pool, exports, "slow", users)
    shelf.gate.set()
    (export,) = {each.result(60) for each in found}
    assert shelf.opened == 1
    assert export.users == set(users)
    late = User()
    offer = exports.offer("slow")
    assert offer is not None
    assert exports.enter(offer, late) is export
    for user in (*users, late):
        assert shelf.disks
        exports.leave(export, user)
    assert not shelf.disks
    assert exports.everything() == []


def test_a_slow_file_keeps_nobody_waiting_who_wants_something_else(
    shelf: Shelf, pool: ThreadPoolExecutor
) -> None:
    own = Export("own", Disk(shelf, SIZE))
    exports = Exports([own], shelf)
    (slow,) = entering(pool, exports, "slow", [User()])

    def others() -> None:
        for name in ("own", "fast"):
            user, offer = User(), exports.offer(name)
            assert offer is not None
            export = exports.enter(offer, user)
            assert export in exports.everything()
            exports.traffic(export)
            exports.leave(export, user)
        exports.add(Export("added", Disk(shelf, SIZE)))
        exports.remove("added", hard=False)
        assert exports.names() == ["own", "fast", "slow"]
        exports.close()

    pool.submit(others).result(60)
    assert not slow.done()
    shelf.gate.set()
    with pytest.raises(ProtocolError):
        slow.result(60)


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("a bug")], ids=repr)
def test_who_was_refused_for_whatever_reason_does_not_keep_an_export_open_later(
    shelf: Shelf, failure: Exception
) -> None:
    exports, refused, user = Exports(shelf=shelf), User(), User()
    offer = exports.offer("fast")
    assert offer is not None
    shelf.failure = failure
    with pytest.raises(type(failure)):
        exports.enter(offer, refused)
    assert not exports._expected
    shelf.failure = None
    export = exports.enter(offer, user)
    assert export.users == {user}
    exports.leave(export, user)
    assert exports.everything() == []


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "bad"), OSError(errno.ETIMEDOUT, "late")])
def test_a_file_that_cannot_be_opened_fails_all_who_wait_and_not_those_who_come_later(
    shelf: Shelf, pool: ThreadPoolExecutor, failure: OSError
) -> None:
    exports = Exports(shelf=shelf)
    users = [User() for _ in range(3)]
    found = entering(pool, exports, "slow", users)
    shelf.failure = failure
    shelf.gate.set()
    for each in found:
        with pytest.raises(ProtocolError, match="cannot be opened"):
            each.result(60)
    assert not exports._expected
    shelf.failure = None
    offer = exports.offer("slow")
    assert offer is not None
    exports.leave(exports.enter(offer, users[0]), users[0])


def test_what_is_opened_too_late_for_everybody_is_closed(shelf: Shelf) -> None:
    exports, user = Exports(shelf=shelf, patience=0.05), User()
    offer = exports.offer("slow")
    assert offer is not None
    for _ in range(3):
        with pytest.raises(ConnectionLostError, match=r"has not answered for 0\.05 s"):
            exports.enter(offer, user)
    assert shelf.opened == 1
    shelf.gate.set()
    wait_until(lambda: not shelf.waiting and not shelf.disks, "it is closed again")
    assert exports.everything() == []
    assert not exports._expected
    exports = Exports(shelf=shelf)
    exports.leave(exports.enter(offer, user), user)


def test_a_name_that_is_taken_meanwhile_is_not_opened_over(shelf: Shelf, pool: ThreadPoolExecutor) -> None:
    exports, user = Exports(shelf=shelf), User()
    (slow,) = entering(pool, exports, "slow", [user])
    added = Export("slow", Disk(shelf, SIZE))
    exports.add(added)
    shelf.gate.set()
    with pytest.raises(ProtocolError, match="replaced"):
        slow.result(60)
    assert exports.everything() == [added]
    assert not added.users
    exports.close()


def test_a_file_that_has_changed_since_it_was_offered_or_is_gone_is_not_served(shelf: Shelf) -> None:
    exports, user = Exports(shelf=shelf), User()
    for name, size in (("fast", SIZE + 1), ("none", SIZE)):
        offer = exports.offer(name)
        assert offer is not None
        shelf.size = size
        with pytest.raises(ProtocolError, match="removed or replaced"):
            exports.enter(offer, user)
        assert exports.everything() == []


def test_clients_that_come_and_go_at_any_moment_leave_nothing_open(
    shelf: Shelf, pool: ThreadPoolExecutor
) -> None:
    exports = Exports(shelf=shelf)
    shelf.gate.set()
    names = ("slow", "fast")

    def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            user, offer = User(), exports.offer(chance.choice(names))
            assert offer is not None
            export = exports.enter(offer, user)
            assert user in export.users
            assert export.backend in shelf.disks
            with suppress(OperatorError):
                # In use by this one at least.
                exports.remove(export.identifier, hard=False)
                raise AssertionError
            exports.leave(export, user)

    for each in [pool.submit(come_and_go, seed) for seed in range(8)]:
        each.result(60)
    assert exports.everything() == []
    assert not exports._expected
