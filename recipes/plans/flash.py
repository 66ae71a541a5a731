"""A flash chip that the guest can write to, as the one with its firmware's variables."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.plans.disks import check_path


@dataclass(frozen=True)
class PlannedFlash:
    """What is in it comes with the RAM, and B's QEMU writes all of it to its file as the guest arrives.

    image   its file on A, as A's QEMU names it
    target  the file on B, which is made, and which ``destination.qemu`` names
    """

    image: str
    target: str

    def check(self) -> None:
        """Raise UsageError if a value cannot be right."""
        for key, path in (("image", self.image), ("target", self.target)):
            check_path(f"flash.{key}", path)
