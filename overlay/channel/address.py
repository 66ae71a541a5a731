"""``migrate:NAME``: the backing that is the export NAME of whoever is at the other end of the channel."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import EXPORT_NAME_LIMIT, NbdUri, parse_uri

SCHEME = "migrate:"


@dataclass(frozen=True, slots=True)
class MigrateUri:
    """The source's export of this name; nothing in it is percent-encoded."""

    export: str

    def __str__(self) -> str:
        return SCHEME + self.export


Address = NbdUri | MigrateUri
"""Where a backing is."""


def parse_backing(text: str) -> Address:
    """Return the address of a backing, an NBD address or ``migrate:NAME``; UsageError for anything else."""
    if not text.startswith(SCHEME):
        return parse_uri(text)
    name = text.removeprefix(SCHEME)
    if not name or not name.isprintable():
        raise UsageError(f"{text!r}: write migrate:NAME, with the name of the source's export")
    if len(name.encode(errors="surrogateescape")) > EXPORT_NAME_LIMIT:
        raise UsageError(f"migrate: an export's name has {EXPORT_NAME_LIMIT} bytes at most")
    return MigrateUri(name)
