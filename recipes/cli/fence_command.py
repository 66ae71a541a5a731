"""``nbd-migrate fence --lift``: the operator's end of what keeps A's guest from its old disk."""

from __future__ import annotations

import argparse
import contextlib

from nbdserve.common import program
from recipes.commands.lift import lift
from recipes.migrate.console import choose_report


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser its options."""
    parser.description = (
        "Make an image of A, whose guest has moved to B, an ordinary one again: it gets its name back, and "
        "whatever starts guests there can start one on it. What the guest has written on B is not in it. It "
        "is refused while B's QEMU has the guest, or somebody acts on the migration. (READY IMAGE... instead "
        "of --lift is for recipes: a process that holds QEMU's image locks.)"
    )
    parser.add_argument(
        "--lift",
        required=True,
        type=program.filled,
        metavar="NAME|IMAGE",
        help="the name of the migration, where it was started; or on A the path of the image, with a slash",
    )
    parser.add_argument(
        "--yes", action="store_true", help="do it; without this it is only said what would be lost"
    )


def main(given: argparse.Namespace) -> int:
    """Lift the fence, or say what would be lost."""
    report = choose_report()
    with contextlib.closing(report):
        lift(given.lift, report, sure=given.yes)
    return program.EXIT_DONE
