"""Hashes of a disk's blocks as a meta context, so that who has a copy asks only for what differs.

Block status in ``nbd-migrate:blake2b-64k``: a block is 64 KiB, aligned, and whole. Its hash, BLAKE2b of 32
bytes (RFC 7693, no key), is told as eight runs of 8 KiB, whose flags are the hash's bytes, four at a time,
little end first. Neighbours that are equal may be one run. The specification is docs/block-hashes.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from hashlib import blake2b

from nbdserve.protocol.extents import Extent

BLOCK_HASHES = "nbd-migrate:blake2b-64k"
BLOCK = 64 << 10
DIGEST = 32
"""Bytes of a hash."""
MOST = 4 << 20
"""Bytes that are hashed for one request, at most: who asks for more asks again."""
_WORDS = struct.Struct("<8I")
_SPAN = BLOCK // 8
"""Bytes of the disk whose run tells four bytes of the hash."""


def block_hash(block: bytes | bytearray | memoryview) -> bytes:
    """Return the hash of one block."""
    return blake2b(block, digest_size=DIGEST).digest()


def hash_runs(
    offset: int, length: int, size: int, read_into: Callable[[int, memoryview], None]
) -> Iterator[Extent]:
    """Yield the runs that tell the hashes of whole blocks from ``offset`` on, of a disk of ``size`` bytes.

    Where none begins there, one run up to the next border that says nothing. Raises what ``read_into`` does.
    """
    end = min(offset + min(length, MOST), size) // BLOCK * BLOCK
    if offset % BLOCK or end <= offset:
        border = min(-(-(offset + 1) // BLOCK) * BLOCK, size)
        yield Extent(min(border, offset + length) - offset, 0)
        return
    with memoryview(bytearray(BLOCK)) as block:
        for place in range(offset, end, BLOCK):
            read_into(place, block)
            for word in _WORDS.unpack(block_hash(block)):
                yield Extent(_SPAN, word)


def told_hashes(status: list[int], length: int) -> list[bytes]:
    """Return the hashes that a reply, lengths and flags in turn, tells of ``length`` bytes; perhaps of fewer.

    What is not told as above ends them.
    """
    words = bytearray()
    most = length // BLOCK * DIGEST
    for span, word in zip(status[0::2], status[1::2], strict=True):
        if span % _SPAN or len(words) >= most:
            break
        words += word.to_bytes(4, "little") * min(span // _SPAN, most // 4)
    whole = min(len(words) // DIGEST * DIGEST, most)
    return [bytes(words[begin : begin + DIGEST]) for begin in range(0, whole, DIGEST)]
