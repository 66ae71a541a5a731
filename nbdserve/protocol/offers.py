"""What a server offers to a client, and what both agree on: the values that option haggling works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from nbdserve.protocol.constants import TransmissionFlags

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
"""In which image of a chain the data is: 1 in the topmost, 2 in its backing, ..., 0 in none."""


@dataclass(frozen=True)
class BlockSizes:
    """Block size constraints of an export, in bytes (proto.md, "Block size constraints").

    ``minimum`` and ``preferred`` are powers of two; ``maximum`` is the longest payload of one request.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 64 << 20


@dataclass(frozen=True)
class Offer:
    """One export as the client is told of it."""

    name: str
    size: int
    flags: TransmissionFlags
    description: str = ""
    block_sizes: BlockSizes = field(default_factory=BlockSizes)
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)


class Catalog(Protocol):
    """Where option haggling finds the exports."""

    def listing(self) -> list[tuple[str, str]]:
        """Return the name and description of each export to list, in order."""

    def offer(self, name: str) -> Offer | None:
        """Return the export of this name (the empty name means the default export), or None."""


class Mode(Enum):
    """How replies are framed."""

    SIMPLE = auto()
    STRUCTURED = auto()
    EXTENDED = auto()


@dataclass(frozen=True)
class Agreement:
    """What both sides agreed on when they enter the transmission phase."""

    offer: Offer
    mode: Mode = Mode.SIMPLE
    contexts: tuple[tuple[int, str], ...] = ()
    """The meta contexts that block status reports: pairs of id and name."""
