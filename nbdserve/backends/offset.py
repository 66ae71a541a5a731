"""The part of an image that an export shows (``--offset`` and ``--size``).

Requests are not cut here: a client's request that breaks the sizes it was told is refused
(protocol/requests.py); nbd.py cuts what another server would refuse (client/export.py says where), and
direct.py widens what is not aligned for O_DIRECT.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.errors import UsageError


@dataclass(frozen=True)
class Slice:
    """From ``offset`` on, ``size`` bytes or up to the end."""

    offset: int = 0
    size: int | None = None

    def length_within(self, whole: int, name: str) -> int:
        """Tell how many bytes of an image of ``whole`` bytes are shown; UsageError when it is too short."""
        if self.offset > whole:
            raise UsageError(
                f"{name}: offset {self.offset} is past the end at {whole} bytes, choose a smaller one"
            )
        rest = whole - self.offset
        if self.size is None:
            return rest
        if self.size > rest:
            raise UsageError(
                f"{name}: {self.size} bytes from {self.offset} on end past {whole}, choose a smaller size"
            )
        return self.size


WHOLE = Slice()
"""All of it."""
