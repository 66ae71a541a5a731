"""Whether what was copied, and not written since, is what the backing has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.client import Client, connect
from nbdserve.common.errors import ConnectError, ImageError
from nbdserve.common.uri import NbdUri
from nbdserve.protocol.constants import ExtentFlags
from overlay.backing.reads import LONGEST, Reading, new_pace, sectors
from overlay.channel.address import Address, MigrateUri, parse_backing
from overlay.formats.image import Image, Run, State
from overlay.formats.open import Layout, open_image

_AT_ONCE, _SLOWLY = 16, 2
"""Parts of at most a MiB that are read from the backing at once; and where the link is slow."""
_GRAIN = 4096
"""Bytes in which differences are counted."""
_MOST_OFFSETS = 16

OnProgress = Callable[[int, int], None]
"""Called with the bytes of the disk that have been looked over, and all of them."""


@dataclass
class Verdict:
    """What a comparison has found; all in bytes but ``differing``."""

    image: str
    backing: str
    size: int
    compared: int = 0
    written: int = 0
    """Not compared: the guest has written it."""
    absent: int = 0
    """Not compared: it has not been copied."""
    differing: int = 0
    """Grains of 4 KiB that are not the same."""
    offsets: list[int] = field(default_factory=list)
    """Where the first of them are."""


def verify(
    path: Path,
    backings: Sequence[Address] = (),
    on_progress: OnProgress = lambda done, total: None,
    layout: Layout | None = None,
    map_file: Path | None = None,
) -> Verdict:
    """Compare an image that nobody else writes to with its backing: at ``backings``, or where it says itself.

    Raises ImageError where the image does not say what was copied, ConnectError, and OSError when the
    backing, or the file, cannot be read.
    """
    with open_image(path, layout=layout, map_file=map_file) as image:
        _require_knowledge(image, path)
        named = backings or [parse_backing(each.name) for each in image.backings]
        with _connect(image, path, _reachable(named)) as client:
            verdict = Verdict(str(path), str(client.uri), image.size)
            _compare(image, client, verdict, on_progress)
    return verdict


def _require_knowledge(image: Image, path: Path) -> None:
    if not image.backings:
        raise ImageError(f"{path}: it needs no backing any more, and so names none to compare it with")
    if not image.records_writer:
        raise ImageError(
            f"{path}: a QED image does not say what was copied and what the guest wrote; a flat one does"
        )
    if not image.is_written_certain:
        raise ImageError(
            f"{path}: after a power cut nobody knows any more what was copied and what the guest wrote: "
            "nothing can be compared"
        )


def _reachable(backings: Sequence[Address]) -> list[NbdUri]:
    """Those that can be connected to from here; ConnectError where that is none."""
    found = [each for each in backings if not isinstance(each, MigrateUri)]
    if backings and not found:
        raise ConnectError(
            f"{backings[0]} is reached only by nbd-overlay serve --channel: name another way to the disk by "
            "--backing, as nbd+unix:///NAME?socket=PATH with that one's --channel-socket"
        )
    return found


def _connect(image: Image, path: Path, backings: Sequence[NbdUri]) -> Client:
    """The first backing that can be reached and has a disk of this size."""
    trouble: ConnectError | None = None
    for uri in backings:
        try:
            client = connect(uri)
        except ConnectError as error:
            trouble = error
            continue
        if sectors(client.size) == image.size:
            return client
        client.close()
        trouble = ConnectError(
            f"{uri}: it has {client.size} bytes, the disk in {path} {image.size}: it is another disk"
        )
    assert trouble is not None, "an image names at least one"
    raise trouble


def _compare(image: Image, client: Client, verdict: Verdict, on_progress: OnProgress) -> None:
    under_way: deque[tuple[int, bytearray, Future[None]]] = deque()
    pace = new_pace()
    for offset, length in _copied(image, client, verdict):
        while len(under_way) >= (_AT_ONCE if pace.length == LONGEST else _SLOWLY):
            _check(image, verdict, *under_way.popleft())
            on_progress(offset, image.size)
        data = bytearray(length)
        under_way.append((offset, data, Reading(offset, memoryview(data)).start(client, pace)))
    while under_way:
        _check(image, verdict, *under_way.popleft())
    on_progress(image.size, image.size)


def _copied(image: Image, client: Client, verdict: Verdict) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is to be read and compared, in parts."""
    for run in image.runs(0, image.size):
        if run.state is State.ABSENT:
            verdict.absent += run.length
        elif run.written:
            verdict.written += run.length
        else:
            verdict.compared += run.length
            found = [(run.offset, run.length)] if run.state is State.DATA else _doubtful(run, client)
            for begin, length in found:
                for place in range(begin, begin + length, LONGEST):
                    yield place, min(LONGEST, begin + length - place)


def _doubtful(run: Run, client: Client) -> Iterator[tuple[int, int]]:
    """Of zeros that are here (offset, length) of what the backing does not say is zeros, too."""
    offset = run.offset
    # Behind the end of a backing that has no whole sectors there are zeros.
    length = max(0, min(run.length, client.size - offset))
    for extent in client.extents(offset, length):
        if not extent.flags & ExtentFlags.ZERO:
            yield offset, extent.length
        offset += extent.length


def _check(image: Image, verdict: Verdict, offset: int, theirs: bytearray, future: Future[None]) -> None:
    future.result()
    ours = image.read(offset, len(theirs))
    if ours == theirs:
        return
    for place in range(0, len(ours), _GRAIN):
        if ours[place : place + _GRAIN] != theirs[place : place + _GRAIN]:
            verdict.differing += 1
            if len(verdict.offsets) < _MOST_OFFSETS:
                verdict.offsets.append(offset + place)
