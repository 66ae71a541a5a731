"""The exports of a server: a name, what it is made of, what a client is told of it, and who uses it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from nbdserve.backends.base import Backend
from nbdserve.common.errors import OperatorError, ProtocolError, UsageError, reason_of
from nbdserve.common.threads import promised
from nbdserve.exports.lookups import TooLateError
from nbdserve.exports.shelf import PATIENCE, Looks, Shelf
from nbdserve.protocol.block_hashes import BLOCK_HASHES
from nbdserve.protocol.constants import MAX_STRING, TransmissionFlags
from nbdserve.protocol.offers import Offer
from nbdserve.transmission.traffic import Traffic

_LOG = logging.getLogger("nbdserve")


class User(Protocol):
    """A client, as far as its export is concerned."""

    traffic: Traffic

    def cut(self, reason: str) -> bool:
        """End its connection now, for this reason. May be called from any thread."""


class Export:
    """One disk under one name.

    ``identifier`` is what the monitor calls it; the name if none is given. The backend belongs to the export.
    ``block_hashes`` offers the hashes of its blocks as a meta context.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        description: str = "",
        identifier: str | None = None,
        *,
        block_hashes: bool = False,
    ) -> None:
        for text in (name, description):
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"export {name[:40]!r}: names and descriptions must be UTF-8") from error
            if len(encoded) > MAX_STRING:
                raise UsageError(f"export {name[:40]!r}...: NBD allows {MAX_STRING} bytes of text")
        self.name = name
        self.identifier = name if identifier is None else identifier
        self.backend = backend
        self.users: set[User] = set()
        self.shelved = False
        """It comes from the shelf, and goes back there when the last user has left."""
        self.removed = False
        """Nobody can choose it any more; it is closed when the last user has left."""
        self.past = Traffic()
        """The requests of those who have left."""
        self.offer = Offer(
            name=name,
            size=backend.size,
            flags=_transmission_flags(backend),
            description=description,
            block_sizes=backend.block_sizes,
            contexts=tuple(dict.fromkeys((*backend.contexts, *[BLOCK_HASHES] * block_hashes))),
        )

    @property
    def owes(self) -> bool:
        """Tell whether something that was acknowledged may not be durable."""
        return not self.backend.capabilities.read_only and self.backend.unflushed

    def flush(self) -> None:
        """Make everything durable; OSError when that fails."""
        if self.owes:
            self.backend.flush()

    def close(self) -> None:
        """Make everything durable and let go of the disk; OSError when the first fails."""
        try:
            self.flush()
        finally:
            self.backend.close()


class Exports:
    """All exports, found by name: the Catalog of every client's option haggling.

    They may be added and removed at any time, from any thread. ``removed`` is called with each that has been
    removed and closed. Those of the shelf come after those that were added; what is looked up there is waited
    for up to ``patience`` seconds, without the lock, and keeps nobody waiting who asks for something else.
    """

    def __init__(
        self, exports: Iterable[Export] = (), shelf: Shelf[Export] | None = None, patience: float = PATIENCE
    ) -> None:
        # Held for moments only: nothing is opened, closed or asked of a file system under it.
        self._lock = threading.Lock()
        self._shelf = Looks(shelf, patience)
        # By name, who waits for an export of the shelf to be opened.
        self._expected: dict[str, set[User]] = {}
        self._closed = False
        self._by_identifier: dict[str, Export] = {}
        self._offered: dict[str, Export] = {}
        self.removed: Callable[[Export], None] = lambda export: None
        self.intact = True
        """Whether ``close`` made everything durable."""
        for export in exports:
            self.add(export)

    def add(self, export: Export) -> None:
        """Offer it to clients from now on; UsageError when name or identifier is taken, or all is over."""
        with self._lock:
            if self._closed:
                raise UsageError(f"export {export.name!r} comes too late: the server stops")
            if export.name in self._offered:
                raise UsageError(f"two exports are called {export.name!r}, give each its own name")
            if export.identifier in self._by_identifier:
                raise UsageError(f"two exports have the id {export.identifier!r}, give each its own")
            self._offered[export.name] = self._by_identifier[export.identifier] = export

    def remove(self, identifier: str, *, hard: bool) -> None:
        """Offer it no more, and close it when nobody uses it.

        ``hard`` ends the connections of those who do; without it they are a reason to refuse. Raises
        OperatorError then, and when there is no such export.
        """
        with self._lock:
            export = self._by_identifier.get(identifier)
            if export is None:
                raise OperatorError(f"there is no export with the id {identifier!r}")
            if export.users and not hard:
                raise OperatorError(
                    f"export {identifier!r} is in use by {len(export.users)} clients: "
                    f"let them disconnect, or remove it with mode hard"
                )
            if not export.removed:
                export.removed = True
                del self._offered[export.name]
            users = list(export.users)
            last = not users and self._forget(export)
        for user in users:
            user.cut(f"disconnected: export {export.name!r} is being removed")
        if last:
            self._close(export)

    def enter(self, offer: Offer, user: User) -> Export:
        """Return the export behind an offer of this catalog, used from now on until ``leave``.

        ProtocolError when it has been removed since the client chose it, or cannot be opened;
        ConnectionLostError when that takes too long.
        """
        export = self._join(offer.name, user)
        if export is None or (export.offer != offer if export.shelved else export.offer is not offer):
            if export is not None:
                self.leave(export, user)
            raise ProtocolError(f"export {offer.name!r} has been removed or replaced")
        return export

    def _join(self, name: str, user: User) -> Export | None:
        """Use an export from now on, one of the shelf after opening it or waiting for who opens it."""
        while True:
            with self._lock:
                export = self._offered.get(name)
                if export is not None:
                    export.users.add(user)
                    return export
                if self._closed or name in self._by_identifier:
                    return None
                self._expected.setdefault(name, set()).add(user)
            try:
                export = self._shelf.open(name, self._take_in)
            except TooLateError as error:
                if self._expects(name, user):
                    raise self._shelf.does_not_answer(name) from error
            except BaseException as error:
                # Whoever has it opened later must not open it for this user, who would never leave it.
                self._expects(name, user)
                if not isinstance(error, OperatorError | OSError):
                    raise
                raise ProtocolError(f"export {name!r} cannot be opened: {error}") from error
            else:
                came_late = self._expects(name, user)
                if export is None or (not came_late and user in export.users):
                    return export

    def _expects(self, name: str, user: User) -> bool:
        """Whether the user still waits for an export; it does not any more."""
        with self._lock:
            expected = self._expected.get(name, set())
            if user not in expected:
                return False
            expected.discard(user)
            if not expected:
                del self._expected[name]
            return True

    def _take_in(self, export: Export | None) -> Export | None:
        """Offer what was on the shelf as one of ours, for all who expect it; if nobody does it is closed."""
        if export is None:
            return None
        name = export.name
        with self._lock:
            users = self._expected.pop(name, set())
            taken = name in self._offered or name in self._by_identifier
            if users and not taken and not self._closed:
                export.shelved = True
                export.users |= users
                self._offered[name] = self._by_identifier[name] = export
                return export
        export.backend.close()
        return None

    def leave(self, export: Export, user: User) -> None:
        """The client uses the export no more."""
        with self._lock:
            export.users.discard(user)
            export.past.add(user.traffic)
            last = (export.removed or export.shelved) and not export.users and self._forget(export)
        if last:
            self._close(export)

    def close(self) -> None:
        """Close all of them, none waited for longer than its backend has patience.

        What may not be durable then is named in the log, and ``intact`` is false.
        """
        with self._lock:
            self._closed = True
            exports = list(self._by_identifier.values())
            self._by_identifier.clear()
            self._offered.clear()
        # All that may be given up go on at the same time, also while disks are waited for.
        exports.sort(key=lambda export: export.backend.last_patience is None)
        for export, ended in [(export, _end(export)) for export in exports]:
            reason = ended()
            if reason is not None:
                self.intact = False
                _LOG.error("export %r: what was written and not flushed may be lost: %s", export.name, reason)

    def everything(self) -> list[Export]:
        """Return all exports at this moment, those that are being removed as well."""
        with self._lock:
            return list(self._by_identifier.values())

    def traffic(self, export: Export) -> Traffic:
        """Return what all its clients have done so far."""
        total = Traffic()
        with self._lock:
            for part in (export.past, *(user.traffic for user in export.users)):
                total.add(part)
        return total

    def names(self) -> list[str]:
        """Return all names in the order in which they were added; on the shelf also what cannot be served."""
        own = [offer.name for offer in self._own_offers()]
        return own + [name for name in self._shelf.names() if name not in own]

    def listing(self) -> list[tuple[str, str]]:
        """Return the name and description of each export to list, in the order in which they were added."""
        own = {offer.name: offer.description for offer in self._own_offers()}
        more = [name for name in self._shelf.names() if name not in own]
        return [*own.items(), *self._shelf.listing(more)]

    def offer(self, name: str) -> Offer | None:
        """Return what is said of an export, or None if there is none of that name.

        ConnectionLostError when that takes too long to find out.
        """
        export = self._offered.get(name)
        return self._shelf.offer(name) if export is None else export.offer

    def _own_offers(self) -> list[Offer]:
        with self._lock:
            return [export.offer for export in self._offered.values() if not export.shelved]

    def _forget(self, export: Export) -> bool:
        """Know an export no more, with the lock held; False when that was done before."""
        if self._by_identifier.get(export.identifier) is not export:
            return False
        del self._by_identifier[export.identifier]
        if self._offered.get(export.name) is export:
            del self._offered[export.name]
        return True

    def _close(self, export: Export) -> None:
        """Close an export that nobody can use any more."""
        try:
            export.close()
        except OSError as error:
            _LOG.error("export %r: what was written may be lost: %s", export.name, error.strerror or error)
        if not export.shelved:
            self.removed(export)


def _end(export: Export) -> Callable[[], str | None]:
    """Flush an export and let go of it. What is returned waits for that, and tells why it failed, if so."""
    seconds = export.backend.last_patience

    def end() -> str | None:
        try:
            # Where a request hangs in the disk its descriptor must not become another file's.
            if export.users:
                export.flush()
            else:
                export.close()
        except OSError as error:
            return reason_of(error)
        return None

    if seconds is None:
        reason = end()
        return lambda: reason
    deadline = time.monotonic() + seconds
    # Where no thread can be started, what it asks for has limits of its own, if longer ones.
    ending = promised(f"end of {export.name}", end)

    def ended() -> str | None:
        try:
            return ending.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return "the server there does not answer" if export.owes else None

    return ended


def _transmission_flags(backend: Backend) -> TransmissionFlags:
    able = backend.capabilities
    flags = TransmissionFlags.HAS_FLAGS
    if able.flush:
        flags |= TransmissionFlags.SEND_FLUSH
    if able.fua:
        flags |= TransmissionFlags.SEND_FUA
    if able.cache:
        flags |= TransmissionFlags.SEND_CACHE
    if able.rotational:
        flags |= TransmissionFlags.ROTATIONAL
    if able.multi_conn:
        flags |= TransmissionFlags.CAN_MULTI_CONN
    if able.read_only:
        return flags | TransmissionFlags.READ_ONLY
    if able.trim:
        flags |= TransmissionFlags.SEND_TRIM
    if able.zero:
        flags |= TransmissionFlags.SEND_WRITE_ZEROES
        if able.fast_zero:
            flags |= TransmissionFlags.SEND_FAST_ZERO
    return flags
