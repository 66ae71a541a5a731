"""The exports of a server: a name, what it is made of, and what a client is told of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbdserve.backends.base import Backend
from nbdserve.errors import UsageError
from nbdserve.protocol.constants import MAX_STRING, TransmissionFlags
from nbdserve.protocol.offers import Offer


@dataclass(frozen=True)
class Export:
    """One disk under one name."""

    name: str
    backend: Backend
    description: str = ""

    def offer(self) -> Offer:
        """What a client is told."""
        return Offer(
            name=self.name,
            size=self.backend.size,
            flags=_transmission_flags(self.backend),
            description=self.description,
            block_sizes=self.backend.block_sizes,
            contexts=self.backend.contexts,
        )


class Exports:
    """All exports, found by name. It is the Catalog of every client's option haggling."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self._exports: dict[str, Export] = {}
        for export in exports:
            if export.name in self._exports:
                raise UsageError(f"two exports are called {export.name!r}, give each its own name")
            for text in (export.name, export.description):
                if len(text.encode()) > MAX_STRING:
                    raise UsageError(f"export {export.name[:40]!r}...: NBD allows {MAX_STRING} bytes of text")
            self._exports[export.name] = export

    def __iter__(self) -> Iterable[Export]:
        return iter(self._exports.values())

    def names(self) -> list[str]:
        """The names to list, in the order of the command line."""
        return list(self._exports)

    def offer(self, name: str) -> Offer | None:
        """What is said of an export, or None if there is none of that name."""
        export = self._exports.get(name)
        return None if export is None else export.offer()

    def backend(self, offer: Offer) -> Backend:
        """The disk behind an offer made by this catalog."""
        return self._exports[offer.name].backend


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
