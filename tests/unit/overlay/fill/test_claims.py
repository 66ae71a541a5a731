"""Who fetches which part of the disk: several who miss the same part make one fetch."""

from __future__ import annotations

import random
import threading

import pytest

from nbdserve.common.errors import ImageError
from overlay.fill.claims import Claim, Claims

UNIT = 64 << 10
SIZE = 100 * UNIT + 4096
LONGEST = 16 * UNIT


def everything(_offset: int, _length: int) -> bool:
    """All of the disk is wanted."""
    return True


def spans(claims: list[Claim]) -> list[tuple[int, int]]:
    """Offsets and lengths."""
    return [(claim.offset, claim.length) for claim in claims]


def test_a_claim_covers_whole_units_around_what_was_asked_for() -> None:
    ours, others = Claims(SIZE, UNIT).take(UNIT + 1, UNIT, everything, LONGEST)
    assert (spans(ours), others) == ([(UNIT, 2 * UNIT)], [])


def test_the_last_unit_of_the_disk_ends_with_it() -> None:
    ours, _ = Claims(SIZE, UNIT).take(SIZE - 1, 1, everything, LONGEST)
    assert spans(ours) == [(100 * UNIT, 4096)]


def test_no_claim_is_longer_than_the_longest_request() -> None:
    ours, _ = Claims(SIZE, UNIT).take(0, SIZE, everything, 16 * UNIT)
    assert max(claim.length for claim in ours) == 16 * UNIT
    assert sum(claim.length for claim in ours) == SIZE


def test_what_is_local_splits_a_claim_and_is_part_of_none() -> None:
    ours, _ = Claims(SIZE, UNIT).take(0, 4 * UNIT, lambda offset, _: offset != UNIT, LONGEST)
    assert spans(ours) == [(0, UNIT), (2 * UNIT, 2 * UNIT)]


def test_who_comes_second_gets_the_claim_of_the_first_to_wait_for() -> None:
    claims = Claims(SIZE, UNIT)
    (first,), _ = claims.take(0, 2 * UNIT, everything, LONGEST)
    ours, others = claims.take(UNIT, 2 * UNIT, everything, LONGEST)
    assert (spans(ours), others) == ([(2 * UNIT, UNIT)], [first])
    assert not first.done.is_set()
    claims.release(first)
    assert first.done.is_set()


def test_what_was_given_back_can_be_claimed_again() -> None:
    claims = Claims(SIZE, UNIT)
    (first,), _ = claims.take(0, UNIT, everything, LONGEST)
    claims.release(first)
    assert claims.idle
    (again,), others = claims.take(0, UNIT, everything, LONGEST)
    assert again is not first
    assert not others


def test_a_damaged_image_leaves_no_claim_behind_that_others_would_wait_for() -> None:
    claims = Claims(SIZE, UNIT)

    def damaged(offset: int, _length: int) -> bool:
        if offset >= 8 * UNIT:
            raise ImageError("a table is damaged")
        return offset % (2 * UNIT) == 0

    with pytest.raises(ImageError):
        claims.take(0, 16 * UNIT, damaged, LONGEST)
    assert claims.idle


def test_threads_never_hold_the_same_unit_at_the_same_time() -> None:
    claims = Claims(SIZE, UNIT)
    owners: dict[int, int] = {}
    clashes: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400):
            offset = chance.randrange(SIZE - 1)
            ours, _ = claims.take(offset, chance.randrange(1, SIZE - offset), everything, LONGEST)
            units = [
                number for claim in ours for number in range(claim.offset // UNIT, -(-sum(claim[:2]) // UNIT))
            ]
            clashes.extend(f"{number}" for number in units if owners.setdefault(number, seed) != seed)
            for number in units:
                del owners[number]
            for claim in ours:
                claims.release(claim)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not clashes
    assert claims.idle
