"""The subcommand ``map``: which parts of a disk are here, as a table, as JSON, and as a picture."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.program import EXIT_DONE, filled_path
from overlay.formats.device.map_place import check_map
from overlay.formats.open import open_image
from overlay.inspect.report import map_json, map_text, printable

DESCRIPTION = """\
Show which parts of the disk the image has: data, zeros, or absent, that is, left to the backing.
On a terminal they are drawn in colours; otherwise there is a line for each run. The JSON is that of qemu-img
map: depth 0 is the image, depth 1 the backing, which is not asked and counts as data.
"""


def add_map_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--map``, of all commands that open an image, to a parser; it becomes an absolute path."""
    parser.add_argument(
        "--map",
        type=lambda text: check_map(filled_path(text)),
        metavar="FILE",
        help="IMAGE is a block device: where its map is (default: as the trailer on the device says)",
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser what the other readers of images have not."""
    parser.add_argument("--png", type=filled_path, metavar="FILE", help="draw the disk into FILE")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="draw it in colours: on a terminal (default), always, or never: a line for each run",
    )


def main(arguments: argparse.Namespace) -> int:
    """Show the disk. Raises UsageError, ImageError, OSError."""
    if arguments.png is not None and arguments.json:
        raise UsageError("--png and --json exclude each other")
    title = printable(str(arguments.image))
    if arguments.png is not None:
        _require_harmless(arguments.png, arguments.image, arguments.map)
    with open_image(
        arguments.image,
        force_share=arguments.force_share,
        layout=arguments.layout,
        map_file=arguments.map,
    ) as image:
        if arguments.json:
            sys.stdout.writelines(map_json(image))
        elif arguments.png is not None:
            from overlay.inspect.drawing import save_png

            _require_harmless(arguments.png, Path(image.map_path))
            save_png(image, arguments.png, title)
        elif _wants_colours(arguments.color):
            from rich.console import Console

            from overlay.inspect.drawing import show

            forced = True if arguments.color == "always" else None
            show(image, Console(highlight=False, force_terminal=forced), title)
        else:
            sys.stdout.writelines(map_text(image))
    return EXIT_DONE


def _require_harmless(png: Path, image: Path, beside: Path | None = None) -> None:
    """No picture may take the place of a disk."""
    taken = {os.path.realpath(image), os.path.realpath(beside or f"{image}.map")}
    if os.path.realpath(png) in taken:
        raise UsageError(f"--png {png}: that is the image itself: name another file")


def _wants_colours(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"
