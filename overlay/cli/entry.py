"""The console script nbd-overlay: quiet when it is interrupted at once."""

from __future__ import annotations

from collections.abc import Callable

from nbdserve.cli.entry import enter


def main() -> int:
    """Run the console script."""

    def imported() -> Callable[[], int]:
        from overlay.cli.main import main

        return main

    return enter(imported)
