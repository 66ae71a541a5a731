"""The option ``--map`` of all commands that open an image."""

from __future__ import annotations

import argparse

from nbdserve.common.program import filled_path
from overlay.formats.device.map_place import check_map


def add_map_option(parser: argparse.ArgumentParser) -> None:
    """Add it to a parser; it becomes an absolute path."""
    parser.add_argument(
        "--map",
        type=lambda text: check_map(filled_path(text)),
        metavar="FILE",
        help="IMAGE is a block device: where its map is (default: as the trailer on the device says)",
    )
