"""The command ``nbd-overlay``: what the operator asks for."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nbdserve
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import Ownership, ownership
from nbdserve.common.program import EXIT_DONE, EXIT_FAILED, Parser, RawHelpFormatter, filled_path, run
from nbdserve.common.sizes import format_size, parse_size
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri
from nbdserve.exports.moved_images import refuse_moved
from overlay.channel.address import Address, MigrateUri, parse_backing
from overlay.cli import (
    commit_command,
    control_command,
    map_command,
    receive_command,
    serve_command,
    verify_command,
)
from overlay.cli.discard import discard, discard_on_device
from overlay.cli.map_command import add_map_option
from overlay.formats.device.block_device import device_size, open_device
from overlay.formats.device.map_place import check_map, default_map, is_among_devices
from overlay.formats.flat import create as flat
from overlay.formats.flat.check import check_flat
from overlay.formats.image import Backing
from overlay.formats.open import LAYOUT_HELP, LAYOUTS, layout_of, open_image, real_path
from overlay.formats.qed import create as qed
from overlay.formats.qed.check import check
from overlay.formats.qed.header import read_header
from overlay.formats.redo.beside import point_of
from overlay.formats.storage import open_file
from overlay.inspect import flat_report
from overlay.inspect.report import check_json, check_text, info_json, info_text

PROGRAM = "nbd-overlay"

_EPILOG = """\
BACKING is nbd://HOST[:PORT]/EXPORT, nbds://..., nbd+unix:///EXPORT?socket=PATH, nbds+unix:///...,
nbd:HOST:PORT[:exportname=EXPORT] or nbd:unix:PATH[:exportname=EXPORT]; or migrate:NAME, the disk of that
name at the other end of serve --channel.
SIZE is a number of bytes, or one with K, M, G, T, P or E (powers of 1024), as in 64K or 1.5T.
Exit codes: 0 done; 1 failed, check found corruptions, or verify a difference; 2 wrong usage.
"""

_CHECK_HELP = """\
Look for references that are wrong (corruptions) and for clusters that nothing refers to (leaks).
Leaks waste space and do no harm: they alone are no failure, unlike with qemu-img, whose exit code is 3.

QED: --repair clears references to what is no cluster of the file (that part of the disk comes from the
backing afterwards), cuts leaked clusters off the end of the file and marks the image as closed cleanly.
Clusters that two references claim cannot be repaired: nobody knows to whom their data belongs.

Flat: that data file and map belong together, and the map's counts agree with its bitmaps. --repair corrects
the counts, and lets the image be used again after a failed sync, without what the log told of.
"""

_DISCARD_HELP = """\
Remove an image that holds nothing, and its map: neither what a guest wrote nor what was copied. It undoes
create, also one that was killed. Any other file is refused, and so is one that is in use. Where there is none
nothing happens. With --copies what was copied from the backing, and is there still, is no reason to keep it.
An image that was committed is of no use any more, and is removed, too.
"""

Command = Callable[[argparse.Namespace], int]


def main() -> int:
    """Run the console script."""
    return run(PROGRAM, lambda: _run_command(sys.argv[1:]))


def _run_command(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    return command(arguments)


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Overlay images: disks whose missing parts come over NBD.",
        epilog=_EPILOG,
        formatter_class=RawHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Command, summary: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=_EPILOG,
            formatter_class=RawHelpFormatter,
        )
        added.add_argument("image", metavar="IMAGE", type=filled_path)
        added.set_defaults(command=command)
        return added

    _add_create_options(add("create", _create, "make an empty image", "Make an image that has nothing yet."))
    away = add("discard", _discard, "remove an image in which nothing is", _DISCARD_HELP)
    away.add_argument(
        "--copies", action="store_true", help="flat: also one that holds copies, but no guest's write"
    )
    add_map_option(away)
    info = add("info", _info, "show what an image says of itself", "Show what an image says of itself.")
    checker = add("check", _check, "look for corruptions and leaks", _CHECK_HELP)
    checker.add_argument("--repair", action="store_true", help="repair what can be repaired")
    mapper = add("map", map_command.main, "show which parts of the disk are here", map_command.DESCRIPTION)
    map_command.configure(mapper)
    for reader in (info, checker, mapper):
        reader.add_argument("--layout", choices=LAYOUTS, help=LAYOUT_HELP)
        add_map_option(reader)
        reader.add_argument("--json", action="store_true", help="answer with qemu-img's JSON")
        reader.add_argument(
            "-U",
            "--force-share",
            action="store_true",
            help="read an image that is in use; the answer may be wrong",
        )
    for module in (serve_command, receive_command, control_command, verify_command, commit_command):
        module.register(commands, _EPILOG)
    return parser


def _add_create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backing",
        metavar="BACKING",
        required=True,
        action="append",
        help="where the disk is now; flat: may be repeated, for the same disk at several places",
    )
    parser.add_argument("--size", metavar="SIZE", help="the disk's size (default: ask the backing)")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="flat",
        help="flat: a raw file with a map beside it, IMAGE.map; qed: QEMU's format (default: flat)",
    )
    parser.add_argument(
        "--map",
        type=filled_path,
        metavar="FILE",
        help="IMAGE is a block device: where its map is kept (default: in /var/lib/nbd-overlay, or, for "
        "others than root, in ~/.local/state/nbd-overlay)",
    )
    parser.add_argument("--cluster-size", metavar="SIZE", help="qed: 4K to 2M (default: 64K)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing IMAGE")
    parser.add_argument(
        "--check",
        action="store_true",
        help="IMAGE is a block device: only look whether an image can be made on it, and print what is there "
        "as a JSON object",
    )
    parser.add_argument("--mode", metavar="MODE", help="mode of IMAGE, octal (default: 0644 less the umask)")
    parser.add_argument(
        "--owner", metavar="USER[:GROUP]", help="owner of IMAGE, as of a QEMU that runs as another user"
    )


def _create(arguments: argparse.Namespace) -> int:
    _check_place(arguments)
    refuse_moved(arguments.image)
    uris = [_lasting(parse_backing(backing)) for backing in arguments.backing]
    size = parse_size(arguments.size, "--size") if arguments.size is not None else _size_of(uris)
    make = _create_qed if arguments.layout == "qed" else _create_flat
    if arguments.image.is_block_device():
        make = _create_on_device
    with _to_the_end():
        size = make(arguments, size, tuple(Backing(str(uri), raw=True) for uri in uris))
    if arguments.check:
        return EXIT_DONE
    backing = ", ".join(map(str, uris))
    print(f"{arguments.image}: {format_size(size)} ({size} bytes), backing {backing}")
    if isinstance(uris[0], MigrateUri):
        if arguments.layout == "qed":
            print(
                "QEMU knows no migrate: only nbd-overlay serve --channel opens the image until it is complete"
            )
    elif arguments.layout == "qed" and uris[0].tls:
        print("QEMU's file names have no TLS: to QEMU, give the backing with -blockdev")
    return EXIT_DONE


def _check_place(arguments: argparse.Namespace) -> None:
    """Raise ImageError or UsageError unless an image may be made there."""
    image: Path = arguments.image
    if image.is_block_device():
        if arguments.layout == "qed":
            raise UsageError(f"{image}: a block device cannot hold a QED image, which grows; name a file")
        if arguments.owner or arguments.mode:
            raise UsageError(
                f"{image}: it is a block device, and udev says whose these are: leave out --owner and --mode"
            )
        return
    if arguments.check:
        raise UsageError(f"--check: {image} is no block device; nothing was looked at")
    if arguments.map is not None:
        raise UsageError(f"--map: the map of a file lies beside it, {image}.map: leave it out")
    if is_among_devices(os.path.realpath(image)):
        raise ImageError(f"{image}: there is no such block device; check the path")
    if not arguments.force and os.path.lexists(image):
        raise ImageError(f"{image}: the file exists; choose another name, or --force to overwrite it")


def _whose(arguments: argparse.Namespace) -> Ownership:
    return ownership(arguments.mode, arguments.owner, "--")


@contextlib.contextmanager
def _to_the_end() -> Iterator[None]:
    """Within this SIGTERM and SIGHUP have to wait: an image is made whole, or not at all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _discard(arguments: argparse.Namespace) -> int:
    if arguments.image.is_block_device():
        if discard_on_device(arguments.image, arguments.map, copies=arguments.copies):
            print(f"{arguments.image}: the overlay on it is removed; what the device held at its end is back")
        return EXIT_DONE
    if arguments.map is not None:
        raise UsageError(f"--map: {arguments.image} is no block device: leave it out")
    if discard(arguments.image, copies=arguments.copies):
        held = "held nothing but copies" if arguments.copies else "was empty"
        print(f"{arguments.image} {held}, and is removed")
    return EXIT_DONE


def _refuse_cluster_size(arguments: argparse.Namespace) -> None:
    if arguments.cluster_size is not None:
        raise UsageError("--cluster-size is for --layout qed: a flat image has grains of 4K")


def _create_flat(arguments: argparse.Namespace, size: int, backings: tuple[Backing, ...]) -> int:
    _refuse_cluster_size(arguments)
    header = flat.new_header(size, backings)
    flat.create(real_path(arguments.image), header, replace=arguments.force, whose=_whose(arguments))
    return header.size


def _create_on_device(arguments: argparse.Namespace, size: int, backings: tuple[Backing, ...]) -> int:
    _refuse_cluster_size(arguments)
    beside = check_map(arguments.map or default_map(arguments.image))
    header = flat.new_header(size, backings)
    if arguments.check:
        with contextlib.closing(open_device(arguments.image, writable=True)) as device:
            held = flat.examine(device, arguments.image, header.size, beside)
            told = {"device-size": device.size(), "sector-size": device.sector(), "holds": held.name.lower()}
        print(json.dumps(told, indent=4))
        return header.size
    flat.create_on_device(arguments.image, header, beside, replace_old=arguments.force)
    return header.size


def _create_qed(arguments: argparse.Namespace, size: int, backings: tuple[Backing, ...]) -> int:
    if len(backings) > 1:
        raise UsageError("a QED image has one --backing: --layout flat takes several")
    cluster_size = qed.DEFAULT_CLUSTER_SIZE
    if arguments.cluster_size is not None:
        cluster_size = parse_size(arguments.cluster_size, "--cluster-size")
    header = qed.new_header(size, backings[0], cluster_size)
    whose = _whose(arguments)
    qed.create(arguments.image, header, backings[0], replace=arguments.force, whose=whose)
    return header.image_size


def _lasting(uri: Address) -> Address:
    """The image outlives our working directory, to which a socket's path may be relative."""
    if isinstance(uri, MigrateUri) or uri.socket is None or uri.socket.startswith("\0"):
        return uri
    path = os.path.abspath(uri.socket)
    return replace(uri, socket=check_socket_path(path, "--backing, absolute as the image needs it"))


def _size_of(addresses: list[Address]) -> int:
    uris = [each for each in addresses if isinstance(each, NbdUri)]
    if len(uris) < len(addresses):
        raise UsageError(
            "--backing migrate:NAME: the source connects only when it migrates, and cannot be asked yet: "
            "give --size, the size of its disk"
        )
    # Only here: what needs no server needs no libnbd.
    from nbdserve.client import connect

    sizes = {}
    for uri in uris:
        with connect(uri) as client:
            sizes[client.size] = uri
    if len(sizes) > 1:
        found = ", ".join(f"{size} bytes at {uri}" for size, uri in sizes.items())
        raise ImageError(f"the backings are not the same disk: {found}")
    return next(iter(sizes))


def _info(arguments: argparse.Namespace) -> int:
    path = real_path(arguments.image)
    if (arguments.layout or layout_of(path, arguments.map)) == "flat":
        show_flat = flat_report.info_json if arguments.json else flat_report.info_text
        sharing, beside = arguments.force_share, arguments.map
        with open_image(path, force_share=sharing, layout="flat", map_file=beside, receiving=True) as image:
            occupied, of_device = path.stat().st_blocks * 512, device_size(path)
            print(show_flat(str(arguments.image), image, occupied, of_device, point_of(image)))
        return EXIT_DONE
    storage = open_file(path, force_share=arguments.force_share)
    try:
        header, backing = read_header(storage, str(arguments.image))
        allocated = storage.allocated()
    finally:
        storage.close()
    local = None
    with contextlib.suppress(ImageError), open_image(path, force_share=True, layout="qed") as image:
        local = image.local_bytes
    show = info_json if arguments.json else info_text
    print(show(str(arguments.image), header, backing, allocated, local))
    return EXIT_DONE


def _check(arguments: argparse.Namespace) -> int:
    repair = arguments.repair
    if repair and arguments.force_share:
        raise UsageError("an image in use cannot be repaired: --force-share and --repair exclude each other")
    path, name = real_path(arguments.image), str(arguments.image)
    if (arguments.layout or layout_of(path, arguments.map)) == "flat":
        found = check_flat(path, repair=repair, force_share=arguments.force_share, map_file=arguments.map)
        print((flat_report.check_json if arguments.json else flat_report.check_text)(name, found))
        return EXIT_FAILED if found.corruptions else EXIT_DONE
    storage = open_file(path, writable=repair, force_share=arguments.force_share)
    try:
        header, _ = read_header(storage, name)
        report = check(storage, header, repair=repair)
    finally:
        storage.close()
    print(check_json(name, report) if arguments.json else check_text(name, report))
    return EXIT_FAILED if report.corruptions else EXIT_DONE
