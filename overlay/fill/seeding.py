"""The part of streaming that takes from a seed what the source has, too: only hashes cross the network."""

from __future__ import annotations

import logging
from collections.abc import Callable

from overlay.backing.connections import Session
from overlay.backing.failover import Sources
from overlay.backing.hashes import LostError, connected
from overlay.backing.seed import Seed
from overlay.backing.seed_scan import fill_from_seed
from overlay.formats.image import Image

_LOG = logging.getLogger("nbd-overlay")

_MOST_LOSSES = 5
"""Connections that are lost one after the other without a hash, after which all is copied."""
_PAUSE = 1.0
"""Seconds before the next."""


class Seeding:
    """Goes once over the disk, before the rest is copied. For the streamer's thread."""

    def __init__(self, seed: Seed, image: Image, sources: Sources) -> None:
        self.bytes = 0
        """Bytes of the disk that came from the seed."""
        self.trouble: str | None = None
        """Why it is not used, or not all of it."""
        self._seed, self._image, self._sources = seed, image, sources
        self._come = 0
        self._is_over = False

    @property
    def path(self) -> str:
        """Return the seed's name."""
        return str(self._seed.path)

    def run(self, session: Callable[[], Session], pause_point: Callable[[float], None]) -> None:
        """Take what can be had, from where it came to before. Raises what ``pause_point`` does, OSError."""
        losses = 0
        while not self._is_over:
            before = self._come
            try:
                self._scan(session(), pause_point)
            except LostError as error:
                losses = losses + 1 if self._come == before else 1
                if losses > _MOST_LOSSES:
                    self._give_up(f"its hashes do not come: {error}")
                pause_point(_PAUSE)
        if self.trouble is None:
            _LOG.info("%s: %d bytes were taken from the seed", self.path, self.bytes)

    def _scan(self, session: Session, pause_point: Callable[[float], None]) -> None:
        client = connected(session, self._sources, lambda: pause_point(0.0))
        if client is None:
            self._give_up(f"{session.source.uri} tells no block hashes (nbdserve --block-hashes does)")
            return
        with client:

            def came(end: int, filled: int) -> None:
                self._come = end
                self.bytes += filled
                pause_point(0.0)

            fill_from_seed(self._image, client, self._seed, self._come, came)
            self._is_over = True

    def _give_up(self, why: str) -> None:
        self.trouble, self._is_over = why, True
        _LOG.warning("%s: the seed is not used any further, the rest is copied: %s", self.path, why)
