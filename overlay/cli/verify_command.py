"""The subcommand ``verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

from nbdserve.common.program import EXIT_DONE, EXIT_FAILED, Parser, RawHelpFormatter, filled_path, tell
from nbdserve.common.sizes import format_size
from overlay.cli.map_command import add_map_option
from overlay.formats.open import LAYOUT_HELP, LAYOUTS

_DESCRIPTION = """\
Compare what was copied, and not written since, with the backing. The image must not be in use, and the
backing be as it was. Only a flat image says what the guest has written: a QED image is refused.
The exit code is 1 when something differs.
"""
_PAUSE = 5.0
"""Seconds between two lines of progress where there is no terminal."""


def register(commands: argparse._SubParsersAction[Parser], epilog: str) -> None:
    """Add the subcommand to those of nbd-overlay."""
    parser = commands.add_parser(
        "verify",
        help="compare what was copied with the backing",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=RawHelpFormatter,
    )
    parser.set_defaults(command=main)
    parser.add_argument("image", metavar="IMAGE", type=filled_path)
    parser.add_argument(
        "--backing",
        action="append",
        default=[],
        metavar="BACKING",
        help="where the disk is now, instead of what the image says; may be repeated: the first that answers "
        "is compared with",
    )
    parser.add_argument("--layout", choices=LAYOUTS, help=LAYOUT_HELP)
    add_map_option(parser)
    parser.add_argument("--json", action="store_true", help="what was found, as a JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Compare, and say what was found. Raises UsageError, ImageError, ConnectError, OSError."""
    from overlay.cli.serve_command import parse_backings
    from overlay.inspect.verify import verify

    backings = parse_backings(arguments.backing)
    progress = Progress()
    try:
        verdict = verify(arguments.image, backings, progress.show, arguments.layout, arguments.map)
    finally:
        progress.clear()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(verdict), indent=4))
        return EXIT_FAILED if verdict.differing else EXIT_DONE
    for offset in verdict.offsets:
        print(f"{arguments.image}: the 4 KiB at {offset} ({offset:#x}) are not those of {verdict.backing}")
    hidden = verdict.differing - len(verdict.offsets)
    if hidden:
        print(f"{arguments.image}: and {hidden} more")
    result = f"{verdict.differing} x 4 KiB differ" if verdict.differing else "no difference"
    print(
        f"{result}: {format_size(verdict.compared)} compared; not compared: {format_size(verdict.written)} "
        f"written by the guest, {format_size(verdict.absent)} absent"
    )
    return EXIT_FAILED if verdict.differing else EXIT_DONE


class Progress:
    """On standard error: a percentage that stays in its place on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + (0.2 if self._live else _PAUSE)

    def show(self, done: int, total: int) -> None:
        """So much has been looked over."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.2 if self._live else _PAUSE)
        text = f"{100 * done / total:.1f}% of {format_size(total)}"
        if self._live:
            tell(f"\r\033[K{text}", end="")
        else:
            tell(text)

    def clear(self) -> None:
        """Give the terminal's line back."""
        if self._live:
            tell("\r\033[K", end="")
