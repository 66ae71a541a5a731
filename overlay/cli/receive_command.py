"""The subcommand ``receive``: the other host's end of ``serve --mirror-writes``."""

from __future__ import annotations

import argparse

from nbdserve.cli.config import socket_owner
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import add_options
from nbdserve.common.program import EXIT_DONE, Parser, RawHelpFormatter, filled_path
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri
from overlay.cli.map_command import add_map_option
from overlay.cli.serve_command import add_running, check_paths
from overlay.formats.flat.image import FlatImage
from overlay.formats.open import open_image
from overlay.formats.redo.beside import point_text, settle
from overlay.options import Options

_DESCRIPTION = """\
Take over what a guest writes on another host, from nbd-overlay serve --mirror-writes there, into an image
over the disk that the guest began with. It is served on a Unix socket, which nbdserve passes on over TLS.

Whatever ends it, the image is the disk as of one instant of the guest's: it is an ordinary overlay after
--finish, or when nbd-overlay serve serves it. Then it is no mirror any more.
"""


def register(commands: argparse._SubParsersAction[Parser], epilog: str) -> None:
    """Add the subcommand to those of nbd-overlay."""
    parser = commands.add_parser(
        "receive",
        help="mirror what a guest writes on another host",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=RawHelpFormatter,
    )
    parser.set_defaults(command=main)
    parser.add_argument("image", metavar="IMAGE", type=filled_path)
    add = parser.add_argument
    add("-k", "--socket", metavar="PATH", help="the Unix socket to serve on")
    add_options(add, "--socket-", "that socket")
    add("-x", "--export-name", default="", metavar="NAME", help="name of the export (default: empty)")
    add_map_option(parser)
    add("--finish", action="store_true", help="serve nothing: let the image be an ordinary overlay")
    add_running(add)


def main(arguments: argparse.Namespace) -> int:
    """Receive until told to stop, or finish. Raises UsageError where the options make no sense, others."""
    if arguments.finish:
        return _finish(arguments)
    if arguments.socket is None:
        raise UsageError("receive: say with --socket where to serve, or --finish to let the image be a disk")
    options = Options(
        image=arguments.image,
        socket=check_socket_path(arguments.socket, "--socket"),
        socket_owner=socket_owner(arguments, [NbdUri(socket=arguments.socket)]),
        name=arguments.export_name,
        map_file=arguments.map,
        daemonize=arguments.daemonize,
        pid_file=arguments.pid_file,
        verbose=arguments.verbose,
        json_log=arguments.log_format == "json",
    )
    check_paths(options)
    # Only now: other subcommands need none of it.
    from overlay.cli.serving import receive

    return receive(options)


def _finish(arguments: argparse.Namespace) -> int:
    """Apply the redo log, as whoever opens the image to write to it does, and say what the disk is."""
    if arguments.socket is not None:
        raise UsageError("receive: --finish serves nothing: leave out --socket")
    with open_image(
        arguments.image, layout="flat", map_file=arguments.map, writable=True, receiving=True
    ) as image:
        if not isinstance(image, FlatImage) or not image.has_redo:
            raise ImageError(f"{arguments.image}: it is no mirror, or is finished already")
        point = settle(image)
    print(f"{arguments.image}: {point_text(point)}")
    return EXIT_DONE
