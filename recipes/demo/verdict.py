"""What the demo has shown: what the guest and the host found, and what is gone, joined into one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nbdserve.common.sizes import format_size
from recipes.demo.disk import Comparison
from recipes.demo.guest import Memory
from recipes.demo.records import newest


@dataclass(frozen=True)
class Phases:
    """The guest's last record at four moments; each is the end of a phase.

    before     the RAM began to move
    cut_over   the guest ran on B
    streamed   every block was local
    verified   the guest was told to stop and look
    """

    before: int
    cut_over: int
    streamed: int
    verified: int

    @property
    def in_order(self) -> bool:
        """Tell whether the guest has written on A, has never fallen back, and has written on B at the end."""
        return 0 < self.before <= self.cut_over <= self.streamed < self.verified

    def live(self, cells: int) -> tuple[int, int, int, int]:
        """Return how many records of each phase were still the newest in their place at the end."""
        ends = (self.before, self.cut_over, self.streamed, self.verified)
        numbers = newest(self.verified, cells).values()
        starts = (0, *ends[:-1])
        a, b, c, d = (sum(start < n <= end for n in numbers) for start, end in zip(starts, ends, strict=True))
        return a, b, c, d


@dataclass(frozen=True)
class Verdict:
    """All that the verdict rests on.

    memory      what the guest found
    phases      when it had written what
    comparison  what the host found in the blocks that the guest did not write
    leftovers   what should be gone but is not, one phrase each
    cells       places on the guest's disk
    """

    memory: Memory
    phases: Phases
    comparison: Comparison
    leftovers: tuple[str, ...]
    cells: int

    @property
    def holds(self) -> bool:
        """Tell whether the disk arrived complete and correct, and nothing on A is needed."""
        return not any(self.failures)

    @property
    def failures(self) -> Iterator[str]:
        """Return what is wrong, a line each."""
        expected = len(newest(self.memory.written, self.cells))
        if self.memory.bad:
            yield f"{self.memory.bad} of the guest's records are not what it wrote; {self.memory.complaint}"
        if self.memory.live != expected:
            yield f"the guest re-read {self.memory.live} records, but has written to {expected} places"
        if not self.phases.in_order:
            yield f"the guest did not go on where it was: {self.phases}"
        if not self.comparison.equal:
            yield (
                f"{self.comparison.different} blocks of 4 KiB are not as they were although the guest did not"
                f" write them, the first at byte {self.comparison.first}"
            )
        yield from self.leftovers

    def lines(self) -> Iterator[str]:
        """Return the verdict as the operator reads it."""
        memory, host = self.memory, self.comparison
        before, moving, streaming, after = self.phases.live(self.cells)
        rewritten = memory.written - memory.live
        yield f"guest    {memory.written} records written, {rewritten} of them replaced by later ones"
        yield f"         {memory.live} re-read and compared with the guest's memory, {memory.bad} wrong"
        yield f"         written before the migration {before}, while the RAM moved {moving}"
        yield f"         while the disk was streamed {streaming}, when A had nothing any more {after}"
        compared = format_size(host.compared)
        yield f"host     {compared} compared with the original, {host.different} blocks of 4 KiB wrong"
        yield f"         the other {format_size(host.excepted)} were written by the guest"
        if not self.leftovers:
            yield "source   server and QEMU have ended, the image is moved away, the copy has no backing file"
        yield from (f"WRONG    {failure}" for failure in self.failures)
        yield f"verdict  {'the disk is complete and correct' if self.holds else 'the migration FAILED'}"
