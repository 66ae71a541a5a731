"""Images of this host that were put out of reach are what they were again: for ``nbd-migrate fence --lift``.

    nbd-migrate give-back [--committed] IMAGE...

With ``--committed`` they have what the guest wrote on B (recipes/recovering/committing.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nbdserve.backends.imagelocks import EXCLUSIVE, WRITER, ImageLocks
from nbdserve.common import program
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.exports.moved_images import Marker, Standing, find_marker, read_marker, refusal
from recipes.fencing.moving import give_back, image_now


def marked(image: Path, *, committed: bool = False) -> tuple[Path, Marker]:
    """Return where the marker of an image is, and what it says.

    Raises ImageError for an image that has none, and, unless what is written to it is known to be
    ``committed``, for one that may be no disk.
    """
    place = find_marker(image)
    if place is None:
        raise ImageError(f"{image}: no guest of it has moved from here: there is no marker to be lifted")
    marker = read_marker(place)
    if marker.standing is Standing.COMMITTING and not committed:
        raise ImageError(refusal(image, marker, place))
    return place, marker


def free(image: Path, *, committed: bool = False) -> None:
    """Give an image that was put out of reach its name back, and remove its marker.

    Raises ImageError where it is not out of reach, or is in use: by the fence, or by the server that B reads.
    """
    place, marker = marked(image, committed=committed)
    now = image_now(marker.image)
    if not now.exists():
        raise ImageError(f"{now} is not there, only its marker: if it is gone for good, remove {place}")
    descriptor = os.open(now, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # As whoever works on it has them, the fence too; kept until it has its name.
        ImageLocks(descriptor, str(now)).hold(WRITER, EXCLUSIVE)
        give_back(place, marker)
    except OSError as error:
        raise ImageError(f"{now} cannot be given its name back: {error.strerror}") from error
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Give images back; return an exit code. Raises ImageError for the first that cannot be.

    With ``--committed`` one that has its name back already is no failure.
    """
    committed = list(arguments[:1]) == ["--committed"]
    images = [Path(image) for image in arguments[committed:]]
    if not images:
        raise UsageError("give-back needs IMAGE...")
    for image in images:
        if not committed or find_marker(image):
            free(image, committed=committed)
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1:])))
