"""The subcommand ``commit``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.program import EXIT_DONE, Parser, RawHelpFormatter, filled
from nbdserve.common.sizes import format_size
from nbdserve.common.uri import NbdUri, parse_uri
from overlay.cli.map_command import add_map_option
from overlay.cli.verify_command import Progress

_DESCRIPTION = """\
Write what the guest wrote in an overlay into the disk that the overlay lies over, as qemu-img commit does;
then that is the guest's disk, and the overlay is of no use any more. For a guest that has ended, when its
overlay is not complete and is not to become so. Of several disks of a guest all are committed, or none.

TARGET is that disk: a raw file or a block device on this host, or the NBD URI of a writable export, as of a
qcow2 image (nbdserve -f qcow2). Neither it nor IMAGE may be in use.

From the first change to the last one the disk begins with a mark instead of its own first 4 KiB, so that
nothing boots from it. Whatever ends the command meanwhile, the same one, typed again, brings it to its end.
What was committed before is not committed again.
"""


def register(commands: argparse._SubParsersAction[Parser], epilog: str) -> None:
    """Add the subcommand to those of nbd-overlay."""
    parser = commands.add_parser(
        "commit",
        help="write what the guest wrote into the disk that an overlay lies over",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=RawHelpFormatter,
    )
    parser.set_defaults(command=main)
    parser.add_argument("image", metavar="IMAGE", type=filled)
    parser.add_argument("target", metavar="TARGET", type=filled)
    parser.add_argument(
        "more", metavar="IMAGE TARGET", nargs="*", type=filled, help="the guest's other disks"
    )
    add_map_option(parser)
    parser.add_argument("--json", action="store_true", help="what was written, as a JSON array")


def main(arguments: argparse.Namespace) -> int:
    """Commit, and say what was written. Raises UsageError, ImageError, ConnectError, OSError."""
    from overlay.commit.committing import Pair, commit

    words: Sequence[str] = [arguments.image, arguments.target, *arguments.more]
    if len(words) % 2:
        raise UsageError(f"{words[-1]}: an IMAGE without its TARGET: name them in pairs")
    if arguments.map is not None and arguments.more:
        raise UsageError("--map: it is the map of one device; of several the trailers name theirs")
    pairs = [
        Pair(Path(image), _place(target), arguments.map)
        for image, target in zip(words[::2], words[1::2], strict=True)
    ]
    _refuse_twice(words)
    progress = Progress()
    try:
        outcomes = commit(pairs, progress.show)
    finally:
        progress.clear()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(each) for each in outcomes], indent=4))
        return EXIT_DONE
    for each in outcomes:
        if each.was_committed:
            print(
                f"{each.target}: nothing was done: {each.image} was committed before; if that was to this "
                "disk, it is the guest's"
            )
        else:
            what = f"{format_size(each.data)} of data and {format_size(each.zeros)} of zeros"
            print(f"{each.target}: {what} committed from {each.image}: it is the guest's disk")
    return EXIT_DONE


def _place(text: str) -> Path | NbdUri:
    return parse_uri(text) if "://" in text or text.startswith("nbd:") else Path(text)


def _refuse_twice(names: Sequence[str]) -> None:
    """Raise UsageError where an image or a disk is named twice."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UsageError(f"{name}: it is named twice")
