"""The consistency check of a flat image, and its repair."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from overlay.formats.flat.grains import Grains
from overlay.formats.flat.header import GRAIN, Flag, Header, Trailer, trailer_at
from overlay.formats.flat.log import clear_log, current_boot, read_log
from overlay.formats.flat.open import open_parts, raw_size
from overlay.formats.storage import Storage


@dataclass(slots=True)
class FlatReport:
    """What a check found, in grains."""

    total: int
    present: int = 0
    written: int = 0
    logged: int = 0
    """Writes in the log, which the bitmaps need not tell of yet."""
    is_clean: bool = True
    """Whether the image was closed in good order."""
    miscounts: int = 0
    """Entries of the directory that do not agree with the bitmap: harmless, a power cut leaves them."""
    miscounts_fixed: int = 0
    corruptions: int = 0
    corruptions_fixed: int = 0
    problems: list[str] = field(default_factory=list)


def check_flat(
    path: Path, *, repair: bool = False, force_share: bool = False, map_file: Path | None = None
) -> FlatReport:
    """Compare directory and bitmaps, and see that the files belong together.

    ``repair`` corrects the directory, and lets an image be used again after a failed sync: the log is dropped
    then, with what it says of writes that nobody knows the fate of. Raises ImageError for files that do not
    belong together or are damaged beyond that, OSError.
    """
    parts = open_parts(path, writable=repair, force_share=force_share, map_file=map_file)
    try:
        parts.check()
        if parts.header is None or parts.file is None:
            return _all_present(raw_size(parts))
        if parts.trailer is None:
            return _all_present(parts.header.size)
        return _check_map(parts.data, parts.file, parts.header, parts.trailer, parts.map_path, repair)
    finally:
        parts.close()


def _all_present(size: int) -> FlatReport:
    """A complete disk: there is nothing that could be wrong."""
    grains = -(-size // GRAIN)
    return FlatReport(grains, grains)


def _check_map(
    data: Storage, file: Storage, header: Header, trailer: Trailer, map_path: str, repair: bool
) -> FlatReport:
    grains = Grains(file, header, map_path)
    report = FlatReport(header.grains, is_clean=bool(header.flags & Flag.CLEAN))
    wrong = grains.recount()
    report.present, report.written = grains.present, grains.written
    if header.boot == current_boot():
        report.logged = len(read_log(file, header.generations)[0])
    failed = (header.flags | trailer.flags) & Flag.FAILED
    if failed:
        report.problems.append("a sync has failed: writes that were acknowledged may be lost")
    if not repair:
        report.miscounts, report.corruptions = wrong, int(bool(failed))
        return report
    report.miscounts_fixed, report.corruptions_fixed = wrong, int(bool(failed))
    if wrong:
        changes = grains.take_changes()
        grains.store_pairs(changes)
        file.sync()
        grains.store_directory(changes)
    if failed:
        clear_log(file)
        flags = Flag.CLEAN | Flag.UNCERTAIN | header.flags & Flag.COMMITTED
        file.write(0, replace(header, flags=flags).pack())
        data.write(trailer_at(header.size), replace(trailer, flags=trailer.flags & ~int(Flag.FAILED)).pack())
        data.sync()
    file.sync()
    return report
