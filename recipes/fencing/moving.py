"""An image of this host whose guest has moved to another one is put out of reach, and given its name back.

    nbd-migrate put-away MIGRATION STANDING IMAGE TO [IMAGE TO]...

The fence is a process, which ends with this host. After a boot whatever starts guests here (libvirt,
systemd, cron) starts this one on its old disk, while it runs elsewhere. Permissions do not keep root's QEMU
from that, locks are gone; a name that is not there keeps everybody, and survives. So IMAGE is renamed to
IMAGE.moved, and IMAGE.moved.json says why (nbdserve/exports/moved_images.py). It stays in its directory, as a
qcow2 image names those below it from there. Who has it open goes on with it.

The marker comes first: from then on our own commands refuse the image under either name. Each step is durable
before the next one, and all of it may be done again after a death at any instant.

A block device, or what cannot be renamed (a mount, no right to do so), has the marker only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nbdserve.common import program
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.exports.moved_images import (
    MARKER,
    MOVED,
    Marker,
    Standing,
    find_marker,
    marker_beside,
    read_marker,
    refusal,
    remove_marker,
    state_directories,
    write_marker,
)
from overlay.formats.device.map_place import name_of
from overlay.formats.storage import sync_directory

_NOREPLACE = 1
"""Of renameat2(2): nothing that is there is replaced (linux/fs.h)."""

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that does not know it."""


def image_now(image: str) -> Path:
    """Return where an image is: where its marker says it was moved to, or else at its path.

    Raises ImageError for a marker that cannot be read.
    """
    place = find_marker(Path(image))
    moved = Path(read_marker(place).moved) if place else None
    return moved if moved and moved.is_file() else Path(image)


def put_away(image: str, migration: str, to: str, standing: Standing = Standing.NEEDED) -> None:
    """Put an image out of reach, as far as that is not done, and say in its marker what it is good for.

    ``to`` is where its guest's disk is now. Raises ImageError where it keeps its name although it is a file:
    then the marker is there all the same, if it could be written.
    """
    path, real = Path(image), Path(os.path.realpath(image))
    known = find_marker(path)
    marker = Marker(image, f"{image}{MOVED}", migration, to, time.time(), standing)
    if known is not None:
        before = read_marker(known)
        half = before.standing is Standing.COMMITTING and standing is not Standing.COMMITTING
        if before.migration != migration or half:
            raise ImageError(refusal(path, before, known))
        marker = replace(marker, time=before.time)
    try:
        if real.is_block_device():
            place = _place_of_device(image)
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_marker(place, replace(marker, moved=""))
            return
        place = marker_beside(real)
        if os.path.lexists(real) and os.path.lexists(f"{real}{MOVED}"):
            write_marker(place, replace(marker, moved=""))
            raise FileExistsError(errno.EEXIST, f"{real}{MOVED} exists")
        write_marker(place, marker)
        try:
            _move(path, real)
        except OSError:
            write_marker(place, replace(marker, moved=""))
            raise
    except OSError as error:
        raise ImageError(
            f"{image} cannot be put out of reach: {error.strerror}; see to it that nothing here starts a "
            "guest on it"
        ) from error


def _move(path: Path, real: Path) -> None:
    """Rename the file itself, so that no name of it leads there but a new one."""
    moved, link = real.with_name(f"{real.name}{MOVED}"), path.with_name(f"{path.name}{MOVED}")
    if path.is_symlink() and not os.path.lexists(link):
        # Those below a qcow2 image are where its path is, not where that leads.
        link.symlink_to(moved)
        sync_directory(link.parent)
    if os.path.lexists(real):
        rename_new(real, moved)
        sync_directory(moved.parent)


def give_back(place: Path, marker: Marker) -> None:
    """Give an image its name back, and remove its marker, which is at ``place``.

    Raises ImageError where another file has its name by now, OSError.
    """
    if marker.moved:
        moved = Path(marker.moved)
        real = Path(os.path.realpath(moved))
        if os.path.lexists(real):
            name = real.with_name(real.name.removesuffix(MOVED))
            try:
                rename_new(real, name)
            except FileExistsError as error:
                raise ImageError(
                    f"{name} is there, and so is {real}, which had this name: move one of them away"
                ) from error
            sync_directory(name.parent)
        if moved.is_symlink():
            moved.unlink()
    remove_marker(place)


def rename_new(old: Path, new: Path) -> None:
    """Rename a file; OSError (EEXIST) where something has the new name."""
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    here = -100  # AT_FDCWD: from the working directory
    if rename(here, os.fsencode(old), here, os.fsencode(new), _NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number not in _CANNOT:
        raise OSError(number, os.strerror(number), str(old))
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    old.rename(new)


def _place_of_device(image: str) -> Path:
    """Where the marker of a block device is written; hosts/places.py has its logs in the same directory."""
    base = state_directories()[0 if os.geteuid() == 0 else -1]
    return base / name_of(image) / f"{Path(image).name}{MARKER}"


def main(arguments: Sequence[str]) -> int:
    """Put images out of reach, each as far as that can be done; return an exit code. Raises OperatorError."""
    if len(arguments) < 4 or len(arguments) % 2 or arguments[1] not in {each.value for each in Standing}:
        raise UsageError("put-away needs MIGRATION STANDING IMAGE TO [IMAGE TO]...")
    migration, standing, *pairs = arguments
    failed: list[str] = []
    for image, to in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            put_away(image, migration, to, Standing(standing))
        except ImageError as error:
            failed.append(str(error))
    if failed:
        raise ImageError("; ".join(failed))
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1:])))
