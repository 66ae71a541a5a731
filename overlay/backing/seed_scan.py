"""Which absent parts of the disk a seed has: found by hashes that the server tells, and not fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from nbdserve.client import Client
from nbdserve.protocol.block_hashes import BLOCK, block_hash
from overlay.backing.hashes import Question
from overlay.backing.seed import Seed
from overlay.formats.image import Image

_AHEAD = 8
"""Requests for hashes under way at once."""
_LONGEST = 1 << 20
"""Bytes of the disk whose hashes are asked for at once."""


def fill_from_seed(
    image: Image, client: Client, seed: Seed, offset: int, came: Callable[[int, int], None]
) -> None:
    """Copy from the seed what is absent from ``offset`` on and is the same in the backing.

    ``came`` is called after each piece with where it ends and how many bytes became local, and may raise. A
    piece is read, hashed and stored from memory, so that a seed that changes does no harm. Raises LostError
    when the server is of no use any more, OSError when the image cannot be changed.
    """
    asked: deque[Question] = deque()
    for begin, end in _pieces(image, seed, offset, client.size):
        asked.append(Question(image, client, begin, end))
        if len(asked) == _AHEAD:
            _take(image, seed, asked.popleft(), came)
    while asked:
        _take(image, seed, asked.popleft(), came)


def _take(image: Image, seed: Seed, question: Question, came: Callable[[int, int], None]) -> None:
    """Store what of a range is the same in the seed."""
    hashes = question.answer()
    step = max(BLOCK, image.cluster_size)
    filled = 0
    for begin in range(question.begin, question.end, step):
        first = (begin - question.begin) // BLOCK
        wanted = hashes[first : first + step // BLOCK]
        data = seed.read(begin, step) if len(wanted) == step // BLOCK else None
        if data is not None and wanted == _hashes(data):
            filled += image.fill(begin, data, question.asked_at)
    came(question.end, filled)


def _hashes(data: bytes) -> list[bytes]:
    with memoryview(data) as view:
        return [block_hash(view[begin : begin + BLOCK]) for begin in range(0, len(data), BLOCK)]


def _pieces(image: Image, seed: Seed, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of what is absent and no hole in the seed: whole blocks, and whole clusters."""
    step = max(BLOCK, image.cluster_size)
    longest = max(_LONGEST, step)
    limit = min(size, image.size, seed.size) // step * step
    reached = offset - offset % step
    for start, length in image.absent(reached, max(0, limit - reached)):
        for first, last in seed.data(start, start + length):
            begin = max(reached, first - first % step)
            end = min(-(-last // step) * step, limit)
            while begin < end:
                reached = min(end, begin - begin % longest + longest)
                yield begin, reached
                begin = reached
