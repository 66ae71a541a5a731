"""The command ``nbd-overlay``: what the operator asks for."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nbdserve
from nbdserve.client import connect
from nbdserve.command import EXIT_DONE, EXIT_FAILED, Parser, run
from nbdserve.errors import ImageError, UsageError
from nbdserve.sizes import format_size, parse_size
from nbdserve.uri import NbdUri, parse_uri
from overlay import control_cli, serve_cli
from overlay.image import Backing
from overlay.qed.check import check
from overlay.qed.create import DEFAULT_CLUSTER_SIZE, create, new_header
from overlay.qed.header import read_header
from overlay.qed.image import QedImage
from overlay.report import check_json, check_text, info_json, info_text, map_json, map_text
from overlay.storage import open_file

PROGRAM = "nbd-overlay"

_EPILOG = """\
BACKING is nbd://HOST[:PORT]/EXPORT, nbds://..., nbd+unix:///EXPORT?socket=PATH, nbds+unix:///...,
nbd:HOST:PORT[:exportname=EXPORT] or nbd:unix:PATH[:exportname=EXPORT].
SIZE is a number of bytes, or one with K, M, G, T, P or E (powers of 1024), as in 64K or 1.5T.
Exit codes: 0 done; 1 failed, or check found corruptions; 2 wrong usage.
"""

_CHECK_HELP = """\
Look for references that are wrong (corruptions) and for clusters that nothing refers to (leaks).
Leaks waste space and do no harm: they alone are no failure, unlike with qemu-img, whose exit code is 3.

--repair clears references to what is no cluster of the file (that part of the disk comes from the
backing afterwards), cuts leaked clusters off the end of the file and marks the image as closed cleanly.
Clusters that two references claim cannot be repaired: nobody knows to whom their data belongs.
"""

_MAP_HELP = """\
List which parts of the disk the image has: data, zeros, or absent, that is, left to the backing.
The JSON is that of qemu-img map: depth 0 is the image, depth 1 the backing, which is not asked and
counts as data.
"""

Command = Callable[[argparse.Namespace], int]


def main() -> int:
    """Entry point of the console script."""
    return run(PROGRAM, lambda: _run_command(sys.argv[1:]))


def _run_command(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    code = command(arguments)
    sys.stdout.flush()
    return code


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Overlay images: disks whose missing parts come over NBD.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Command, summary: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("image", metavar="IMAGE", type=Path)
        added.set_defaults(command=command)
        return added

    _add_create_options(add("create", _create, "make an empty image", "Make an image that has nothing yet."))
    info = add("info", _info, "show what an image says of itself", "Show what an image says of itself.")
    checker = add("check", _check, "look for corruptions and leaks", _CHECK_HELP)
    checker.add_argument("--repair", action="store_true", help="repair what can be repaired")
    mapper = add("map", _map, "show which parts of the disk are here", _MAP_HELP)
    for reader in (info, checker, mapper):
        reader.add_argument("--json", action="store_true", help="answer with qemu-img's JSON")
        reader.add_argument(
            "-U",
            "--force-share",
            action="store_true",
            help="read an image that is in use; the answer may be wrong",
        )
    for module in (serve_cli, control_cli):
        module.register(commands, _EPILOG)
    return parser


def _add_create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backing", metavar="BACKING", required=True, help="where the disk is now")
    parser.add_argument("--size", metavar="SIZE", help="the disk's size (default: ask the backing)")
    parser.add_argument("--layout", choices=["qed"], default="qed", help="the image's format (default: qed)")
    parser.add_argument("--cluster-size", metavar="SIZE", help="4K to 2M (default: 64K)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing IMAGE")


def _create(arguments: argparse.Namespace) -> int:
    if not arguments.force and os.path.lexists(arguments.image):
        raise ImageError(
            f"{arguments.image}: the file exists; choose another name, or --force to overwrite it"
        )
    uri = parse_uri(arguments.backing)
    if uri.socket is not None and not uri.socket.startswith("\0"):
        # The image outlives our working directory.
        uri = replace(uri, socket=os.path.abspath(uri.socket))
    cluster_size = DEFAULT_CLUSTER_SIZE
    if arguments.cluster_size is not None:
        cluster_size = parse_size(arguments.cluster_size, "--cluster-size")
    size = parse_size(arguments.size, "--size") if arguments.size is not None else _size_of(uri)
    backing = Backing(str(uri), raw=True)
    header = new_header(size, backing, cluster_size)
    create(arguments.image, header, backing, replace=arguments.force)
    print(f"{arguments.image}: {format_size(header.image_size)} ({header.image_size} bytes), backing {uri}")
    if uri.tls:
        print("QEMU's file names have no TLS: to QEMU, give the backing with -blockdev")
    return EXIT_DONE


def _size_of(uri: NbdUri) -> int:
    with connect(uri) as client:
        return client.size


def _info(arguments: argparse.Namespace) -> int:
    storage = open_file(arguments.image, force_share=arguments.force_share)
    try:
        path = str(arguments.image)
        header, backing = read_header(storage, path)
        show = info_json if arguments.json else info_text
        print(show(path, header, backing, storage.allocated()))
    finally:
        storage.close()
    return EXIT_DONE


def _check(arguments: argparse.Namespace) -> int:
    repair = arguments.repair
    if repair and arguments.force_share:
        raise UsageError("an image in use cannot be repaired: --force-share and --repair exclude each other")
    storage = open_file(arguments.image, writable=repair, force_share=arguments.force_share)
    try:
        path = str(arguments.image)
        header, _ = read_header(storage, path)
        report = check(storage, header, repair=repair)
    finally:
        storage.close()
    print(check_json(path, report) if arguments.json else check_text(path, report))
    return EXIT_FAILED if report.corruptions else EXIT_DONE


def _map(arguments: argparse.Namespace) -> int:
    with QedImage.open(arguments.image, force_share=arguments.force_share) as image:
        sys.stdout.writelines(map_json(image) if arguments.json else map_text(image))
    return EXIT_DONE
