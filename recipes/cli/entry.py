"""The console script nbd-migrate: quiet when it is interrupted at once."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nbdserve.cli.entry import enter


def main() -> int:
    """Run the console script."""

    def imported() -> Callable[[], int]:
        from recipes.cli.small import find

        alone = find(sys.argv[1:])
        if alone:
            return alone
        from recipes.cli.main import main

        return main

    return enter(imported)
