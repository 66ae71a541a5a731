"""``nbd-migrate pivot``: a guest's disk moves from nbd-overlay's socket to the complete local file."""

from __future__ import annotations

import argparse
from pathlib import Path

from nbdserve.common import clock, program
from overlay.formats.open import open_image
from recipes.errors import MigrationError
from recipes.plans.plan import check_monitor
from recipes.qemu.pivot import Pivot, pivot
from recipes.qemu.vm import connect


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser its options."""
    parser.description = (
        "Let a running QEMU use a complete image itself, instead of nbd-overlay, while its guest writes; "
        "run it on the host of that QEMU. It may be run again after any failure."
    )
    parser.add_argument(
        "--qmp", required=True, metavar="ADDRESS", help="monitor of that QEMU: a socket's path, or HOST:PORT"
    )
    parser.add_argument("--node", default="disk0", help="the guest's block node (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=program.seconds,
        default=25.0,
        metavar="S",
        help="seconds for each answer, more than the node's reconnect-delay (default: %(default)g)",
    )
    parser.add_argument(
        "image", type=program.filled_path, metavar="IMAGE", help="the image that nbd-overlay serves"
    )


def main(given: argparse.Namespace) -> int:
    """Pivot. Raises UsageError, ImageError, ConnectError or MigrationError with one line."""
    monitor, image = given.qmp.removeprefix("unix:"), given.image.absolute()
    check_monitor("--qmp", monitor)
    check_complete(image)
    clock.run(move(monitor, Pivot(given.node, str(image), given.timeout, image.is_block_device())))
    print(f"the guest's disk is {image}; nbd-overlay is not needed any more")
    return program.EXIT_DONE


def check_complete(image: Path) -> None:
    """Raise MigrationError, or ImageError, unless the image is a whole raw disk."""
    # Shared, as after a pivot that was interrupted QEMU may have it open already.
    opened = open_image(image, force_share=True, layout="flat")
    try:
        if opened.backings:
            raise MigrationError(
                f"{image}: {opened.local_bytes} of {opened.size} bytes are local; complete it first: "
                "nbd-overlay stream, nbd-overlay wait"
            )
    finally:
        opened.close()


async def move(monitor: str, what: Pivot) -> None:
    """Connect to the monitor, pivot and leave it to others."""
    vm = await connect("QEMU", monitor, limit=what.limit, command_limit=what.limit)
    try:
        await pivot(vm, what)
    finally:
        await vm.disconnect()
