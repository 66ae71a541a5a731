"""Where more exports are than those that are open, and how long it may take to look for one there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, Protocol, TypeVar

from nbdserve.common.errors import ConnectionLostError
from nbdserve.exports.lookups import Lookups, TooLateError
from nbdserve.protocol.offers import Offer

_LOG = logging.getLogger("nbdserve")

PATIENCE = 10.0
"""Seconds for which a look at a shelf is waited for, unless the operator says otherwise."""

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)


class Shelf(Protocol[E_co]):
    """Exports that are opened when they are used and closed when they are not. Everything may hang."""

    def names(self) -> list[str]:
        """Return what there is now; OSError when that cannot be told."""

    def offer(self, name: str) -> Offer | None:
        """Return what a client is told of one; None if there is none of that name, or it cannot be served."""

    def open(self, name: str) -> E_co | None:
        """Open the export; None if there is none. OperatorError or OSError when it cannot be had."""


class Looks(Generic[E]):
    """Looks at a shelf, if there is one, each waited for up to ``patience`` seconds by those who want it."""

    def __init__(self, shelf: Shelf[E] | None, patience: float) -> None:
        self._shelf = shelf
        self._lookups = Lookups(patience)

    def names(self) -> list[str]:
        """Return what there is now; nothing, and a line in the log, when that cannot be told."""
        if self._shelf is None:
            return []
        try:
            return self._lookups.get("names", self._shelf.names)
        except OSError as error:
            _LOG.error("some exports are not listed: %s", error)
        except TooLateError:
            _LOG.error("some exports are not listed: their file system does not answer")
        return []

    def listing(self, names: list[str]) -> Iterator[tuple[str, str]]:
        """Return those of the names that can be served, as far as that is known in time, described."""
        deadline = time.monotonic() + self._lookups.patience / 2
        for name in names:
            left = deadline - time.monotonic()
            try:
                offer = self._look_up(name, left) if left > 0 else None
            except TooLateError:
                left = 0.0
            if left <= 0:
                yield name, ""
            elif offer is not None:
                yield name, offer.description

    def offer(self, name: str) -> Offer | None:
        """Return what a client is told of an export; ConnectionLostError when that takes too long."""
        try:
            return self._look_up(name, None)
        except TooLateError as error:
            raise self.does_not_answer(name) from error

    def open(self, name: str, keep: Callable[[E | None], E | None]) -> E | None:
        """Return what ``keep`` makes of an export that is opened, for all who wait; it may refuse it.

        TooLateError when that takes too long; ``keep`` is called nevertheless when it has been opened. Raises
        what opening does.
        """
        shelf = self._shelf
        return None if shelf is None else self._lookups.get(f"open {name}", lambda: keep(shelf.open(name)))

    def does_not_answer(self, name: str) -> ConnectionLostError:
        """Return what to tell of a client that has waited in vain."""
        seconds = self._lookups.patience
        return ConnectionLostError(f"export {name!r}: its file system has not answered for {seconds:g} s")

    def _look_up(self, name: str, patience: float | None) -> Offer | None:
        if self._shelf is None:
            return None
        return self._lookups.get(f"offer {name}", partial(self._shelf.offer, name), patience)
