"""What an end of a channel takes: limits, and what the greeting offers of them."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.channel.wire.greeting import Offer
from nbdserve.channel.wire.streams import StreamClass

_MIB = 1 << 20
IN_BULK = {StreamClass.DEMAND: 8 * _MIB, StreamClass.RAM: 16 * _MIB, StreamClass.STREAMING: 16 * _MIB}
"""Windows, in bytes, of the destination, to which RAM and disks go; 16 MiB last a gigabit a second 0.13 s."""
REQUESTS = dict.fromkeys(StreamClass, _MIB)
"""Windows of the source, to which requests and the return path go."""


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

    def offer(self, windows: dict[StreamClass, int]) -> Offer:
        """Return what is said in the greeting."""
        return Offer(windows, self.streams, round(self.silence * 1000))
