"""A directory whose regular files are exports, each by its name: looked up when a client asks for it.

A name is that of a file right in the directory. Hidden files, and what is no regular file, are not there for
clients, nor are symbolic links, wherever they point to.
"""

from __future__ import annotations

import logging
import os
import stat

from nbdserve.common.errors import OperatorError
from nbdserve.exports.export_options import DirectoryOptions, ExportOptions, ImageOptions
from nbdserve.exports.images import describe, open_export
from nbdserve.exports.served_exports import Export
from nbdserve.protocol.offers import Offer

_LOG = logging.getLogger("nbdserve")


class Directory:
    """The raw images in one directory. Raises OSError when it cannot be read."""

    def __init__(self, wanted: DirectoryOptions, how: ImageOptions) -> None:
        self._wanted = wanted
        self._how = how
        self.names()

    def names(self) -> list[str]:
        """Return the files that are there now, sorted."""
        with os.scandir(self._wanted.path) as entries:
            files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        return sorted(filter(_is_harmless, files))

    def offer(self, name: str) -> Offer | None:
        """Return what a file is as an export; None when there is none, or it cannot be served."""
        if not self._has(name):
            return None
        try:
            return describe(self._options(name), self._how)
        except (OperatorError, OSError) as error:
            _LOG.warning("not served: %s", error)
            return None

    def open(self, name: str) -> Export | None:
        """Open the export; None when there is no such file. OperatorError or OSError when that fails."""
        return open_export(self._options(name), self._how) if self._has(name) else None

    def _has(self, name: str) -> bool:
        if not _is_harmless(name):
            return False
        try:
            return stat.S_ISREG((self._wanted.path / name).lstat().st_mode)
        except OSError:
            return False

    def _options(self, name: str) -> ExportOptions:
        wanted = self._wanted
        return ExportOptions(name, wanted.path / name, wanted.format, wanted.read_only, follow_links=False)


def _is_harmless(name: str) -> bool:
    """Whether a name can only be that of a file right in the directory, and is meant to be seen."""
    try:
        name.encode()
    except UnicodeEncodeError:
        # Not UTF-8 on disk: no client could ask for it.
        return False
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name
