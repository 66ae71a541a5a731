"""What the demo has shown: the guest's memory, the host's comparison, and what must be gone, joined into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recipes.demo.disk import Comparison
from recipes.demo.guest import Memory
from recipes.demo.records import newest


@dataclass(frozen=True)
class Phases:
    """The guest's last record at four moments; each is the end of a phase.

    before     the six steps began
    cut_over   the guest ran on B
    streamed   every block was local
    verified   the guest was told to stop and look
    """

    before: int
    cut_over: int
    streamed: int
    verified: int

    def live(self, cells: int) -> tuple[int, int, int, int]:
        """How many records of each phase were still the newest in their place at the end."""
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
        """Whether the disk arrived complete and correct, and nothing on A is needed."""
        return not any(self.failures)

    @property
    def failures(self) -> Iterator[str]:
        """What is wrong, a line each."""
        expected = len(newest(self.memory.written, self.cells))
        if self.memory.bad:
            yield f"{self.memory.bad} of the guest's records are not what it wrote; {self.memory.complaint}"
        if self.memory.live != expected:
            yield f"the guest re-read {self.memory.live} records, but has written to {expected} places"
        if not self.phases.before < self.phases.cut_over < self.phases.streamed < self.phases.verified:
            yield f"the guest did not write in every phase: {self.phases}"
        if not self.comparison.equal:
            yield (
                f"{self.comparison.different} blocks of 4 KiB that the guest did not write differ from the original,"
                f" the first at byte {self.comparison.first}"
            )
        yield from self.leftovers

    def lines(self) -> Iterator[str]:
        """The verdict as the operator reads it."""
        before, moving, streaming, after = self.phases.live(self.cells)
        yield (
            f"guest   {self.memory.written} records written, {self.memory.live} re-read (the others were rewritten),"
            f" {self.memory.bad} bad"
        )
        yield (
            f"        of these {before} from before, {moving} while the RAM moved, {streaming} while the disk was"
            f" streamed, {after} after the source was gone"
        )
        yield (
            f"host    {self.comparison.compared / 2**20:.1f} MiB that the guest did not write compared with the"
            f" original, {self.comparison.different} blocks differ"
            f" ({self.comparison.excepted / 2**20:.1f} MiB written by the guest)"
        )
        yield from (f"WRONG   {failure}" for failure in self.failures)
        yield "VERDICT the disk is complete and correct" if self.holds else "VERDICT the migration FAILED"
