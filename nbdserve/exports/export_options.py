"""What is to be served, as values: from the command line, or from the monitor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdserve.backends.filters import Caching, DetectZeroes
from nbdserve.backends.offset import WHOLE, Slice
from nbdserve.backends.opening import may_keep_old_pages
from nbdserve.common.uri import NbdUri, parse_uri


@dataclass(frozen=True)
class ExportOptions:
    """One export, as the operator asked for it: of a file, or of another server's export."""

    name: str
    source: Path | NbdUri
    format: str | None = None
    read_only: bool = False
    description: str = ""
    part: Slice = WHOLE
    follow_links: bool = True
    """Whether the file may be a symbolic link."""


@dataclass(frozen=True)
class DirectoryOptions:
    """A directory whose files are exports; ``format`` is as in ExportOptions, of all of them."""

    path: Path
    format: str | None = None
    read_only: bool = False


@dataclass(frozen=True)
class ImageOptions:
    """How all images are opened."""

    discard: bool = True
    """Whether a trim gives space back."""
    fence: bool = False
    """Whether QEMUs are kept from opening them for writing."""
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    caching: Caching | None = None
    """None: the page cache is used, unless that may be out of date: see ``caching_of``."""
    block_hashes: bool = False
    """Whether clients are told hashes of their blocks."""
    aio: str | None = None
    """How qemu-nbd does its input and output, where it does."""
    patience: float = 10.0
    """Seconds for which requests wait for another server that is lost."""

    def caching_of(self, path: Path, *, read_only: bool) -> Caching:
        """Return how an image is opened.

        What is served read-only may be written to by others, past a page cache that is not told of that.
        """
        if self.caching is not None:
            return self.caching
        return Caching.NONE if read_only and may_keep_old_pages(path) else Caching.WRITEBACK


def source(text: str) -> Path | NbdUri:
    """Return a file's path, or the address of another server's export; UsageError when that is malformed."""
    scheme = text.partition(":")[0].partition("+")[0]
    return parse_uri(text) if ":" in text and scheme in ("nbd", "nbds") else Path(text)
