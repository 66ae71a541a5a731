"""What a server says of an export."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.protocol.offers import BASE_ALLOCATION


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of an export. Sizes in bytes; a block size of 0 means that it named none."""

    size: int
    read_only: bool
    multi_conn: bool
    """Several connections see one another's writes, and flush them (NBD_FLAG_CAN_MULTI_CONN)."""
    flush: bool
    fua: bool
    trim: bool
    zero: bool
    fast_zero: bool
    cache: bool
    rotational: bool
    structured_replies: bool
    """The server offers structured replies, and this client took the offer."""
    contexts: tuple[str, ...]
    """The meta contexts that were asked for and that the server answers block status for."""
    minimum_block: int
    preferred_block: int
    maximum_block: int

    @property
    def has_extents(self) -> bool:
        """The server answers block status for ``base:allocation``."""
        return BASE_ALLOCATION in self.contexts

    def payload(self, length: int) -> int:
        """Return so many bytes, or as many as one read or write may carry if those are fewer."""
        return min(length, self.maximum_block or length)

    def piece(self, offset: int, length: int, longest: int) -> int:
        """Tell how many bytes the first of the requests has that make up a range.

        With what lies before ``offset`` in its block it has at most ``longest`` bytes, or a block if that is
        more. All but the last end with a block.
        """
        block = self.minimum_block or 1
        end = offset + max(longest - longest % block, block)
        return min(end - end % block - offset, length)
