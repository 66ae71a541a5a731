"""The beginning and the end of a command's process, in which an interruption is as quiet as in between.

A command imports modules for some tenths of a second. An interruption in that time ends it at once, with the
exit code of any other: nothing has been begun yet. Imported here is only what costs nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

EXIT_INTERRUPTED = 130
"""As program.py has it, which is one of those that take their time."""


def enter(imported: Callable[[], Callable[[], int]]) -> int:
    """Import a command's main function by this one, run it, and return its exit code.

    Where SIGINT is ignored, as for what a script runs in the background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return imported()()
    signal.signal(signal.SIGINT, _end)
    main = imported()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        # The interpreter takes a moment to end, too.
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)


def main() -> int:
    """Run the console script nbdserve."""

    def imported() -> Callable[[], int]:
        from nbdserve.cli.main import main

        return main

    return enter(imported)
