"""What an end of a channel takes: limits, and what the greeting offers of them."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.channel.wire.greeting import Offer

_MIB = 1 << 20
IN_BULK = 16 * _MIB
"""The destination's window, in bytes, as RAM and disks go there; it lasts a gigabit a second 0.13 s."""
REQUESTS = _MIB
"""The source's, in bytes, to which requests and the return path go."""


@dataclass(frozen=True)
class Limits:
    """What a channel may take. Times are in seconds, sizes in bytes."""

    silence: float = 15.0
    """A peer of which nothing is heard for so long is dead."""
    greeting: float = 10.0
    """In which a peer must have proven itself, TLS included."""
    unproven: int = 8
    """Connections that have not; for the next one the first of these is closed."""
    streams: int = 128
    """Open at a time."""

    def offer(self, window: int) -> Offer:
        """Return what is said in the greeting, with a window of so many bytes."""
        return Offer(window, self.streams, round(self.silence * 1000))
