"""The subcommand ``serve``: its options, checked before anything is started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from nbdserve.cli.config import host_and_port, monitor_owner, monitor_path, socket_owner
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import add_options
from nbdserve.common.program import Parser, RawHelpFormatter, filled_path, patience, positive
from nbdserve.common.sizes import parse_size
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri, parse_uri
from overlay.channel.address import Address, parse_backing
from overlay.channel.options import add_channel, read_channel
from overlay.cli.map_command import add_map_option
from overlay.formats.device.map_place import is_among_devices
from overlay.formats.open import LAYOUT_HELP, LAYOUTS
from overlay.options import MIRROR_QUEUE, Options

MOST_CONNECTIONS = 64
LEAST_QUEUE = 1 << 20

_DESCRIPTION = """\
Serve an image over NBD on a Unix socket. What is missing of the disk comes from the backing and is kept
(copy-on-read); with --stream all of the disk is copied, and then the backing is needed no more.

--armed is for a migration, before the guest is here: nothing that is read is kept until nbd-overlay activate,
or the guest's first write, says that it runs here, and only then --stream begins. --pre-copy instead copies
while the guest runs elsewhere: whoever chooses it invalidates what the guest changes there.

--channel is for a migration over one connection: the source's end (nbdserve channel, which QEMU starts)
connects here. It brings the RAM, for the QEMU at --incoming, and is the backing migrate:NAME; the image is
armed until the RAM has arrived. When the whole disk is here the source's end is told so, and ends by itself.
"""


def register(commands: argparse._SubParsersAction[Parser], epilog: str) -> None:
    """Add the subcommand to those of nbd-overlay."""
    parser = commands.add_parser(
        "serve",
        help="serve an image as a disk, and fill it",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=RawHelpFormatter,
    )
    parser.set_defaults(command=main)
    parser.add_argument("image", metavar="IMAGE", type=filled_path)
    add = parser.add_argument
    add("-k", "--socket", required=True, metavar="PATH", help="the Unix socket to serve on")
    add_options(add, "--socket-", "that socket")
    add("-x", "--export-name", default="", metavar="NAME", help="name of the export (default: empty)")
    add(
        "--layout",
        choices=LAYOUTS,
        help=LAYOUT_HELP,
    )
    add_map_option(parser)
    add("--size", metavar="SIZE", help="the disk's, once it is complete on a block device that is larger")
    add("--qmp", metavar="unix:PATH", help="live control: stream, status, pause, ... over QEMU's protocol")
    add_options(add, "--qmp-", "the monitor's socket")
    add(
        "--backing",
        action="append",
        default=[],
        metavar="BACKING",
        help="where the disk is now, instead of what the image says; may be repeated: the same disk from "
        "several places",
    )
    add_channel(parser.add_argument_group("a migration over one connection"))
    add(
        "--copy-on-read",
        choices=("on", "off"),
        default="on",
        help="whether what guests read is kept (default: on)",
    )
    add("--stream", action="store_true", help="copy the whole disk in the background")
    add(
        "--seed",
        type=filled_path,
        metavar="FILE",
        help="a raw older copy: only what differs is streamed, if the source is nbdserve --block-hashes",
    )
    add(
        "--verify",
        action="store_true",
        help="compare what was copied with the source by hashes of blocks, but for what the guest has "
        "written, before that is needed no more; as --seed, it needs nbdserve --block-hashes there",
    )
    add("--speed", metavar="SIZE", help="bytes per second at which to stream, at most (default: no limit)")
    add(
        "--mirror-writes",
        metavar="URI",
        help="also send what the guest writes, in order, to this nbd-overlay receive on another host: a "
        "complete disk, as of a moment ago, if this one is lost",
    )
    add(
        "--mirror-queue",
        metavar="SIZE",
        help="memory for writes that are on their way there; beyond that they are read again from the image "
        "(default: 64M)",
    )
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--armed", action="store_true", help="keep nothing until the guest is here")
    mode(
        "--pre-copy",
        action="store_true",
        help="copy before the guest is here, and never be complete until then (see nbd-overlay invalidate)",
    )
    add(
        "--connections",
        type=positive,
        default=Options.connections,
        metavar="N",
        help="to each backing (%(default)s)",
    )
    add(
        "--reconnect-timeout",
        type=patience,
        default=Options.patience,
        metavar="S",
        help="how long guests wait for a backing that is lost, or connected and silent (%(default)g)",
    )
    add("--simple-replies", action="store_true", help="offer no structured replies")
    add("--metrics", metavar="HOST:PORT", help="tell Prometheus over HTTP")
    add_running(add)


def add_running(add: Callable[..., object]) -> None:
    """Add how a daemon runs, whatever it does."""
    add("--daemonize", action="store_true", help="return when ready, and serve in the background")
    add("--pid-file", type=filled_path, metavar="FILE", help="holds the process id when ready")
    add("-v", "--verbose", action="store_true", help="log more")
    add("--log-format", choices=("text", "json"), default="text", help="lines of text, or objects")


def main(arguments: argparse.Namespace) -> int:
    """Serve until told to stop. Raises UsageError where the options make no sense, other OperatorErrors."""
    options = read_options(arguments)
    # Only now: other subcommands need none of it.
    from overlay.cli.serving import serve

    return serve(options)


def read_options(given: argparse.Namespace) -> Options:
    """Return what was asked for; UsageError or ImageError where that cannot be done."""
    monitor = None if given.qmp is None else monitor_path(given.qmp)
    options = Options(
        image=given.image,
        socket=check_socket_path(given.socket, "--socket"),
        name=given.export_name,
        monitor=monitor,
        socket_owner=socket_owner(given, [NbdUri(socket=given.socket)]),
        monitor_owner=monitor_owner(given),
        backings=parse_backings(given.backing),
        keep=given.copy_on_read == "on",
        stream=given.stream,
        seed=given.seed,
        verify=given.verify,
        speed=0 if given.speed is None else parse_size(given.speed, "--speed"),
        armed=given.armed,
        pre_copy=given.pre_copy,
        channel=read_channel(given),
        mirror=None if given.mirror_writes is None else parse_uri(given.mirror_writes),
        mirror_queue=_mirror_queue(given),
        connections=given.connections,
        patience=given.reconnect_timeout,
        metrics=None if given.metrics is None else host_and_port(given.metrics),
        structured_replies=not given.simple_replies,
        layout=given.layout,
        map_file=given.map,
        size=None if given.size is None else parse_size(given.size, "--size"),
        daemonize=given.daemonize,
        pid_file=given.pid_file,
        verbose=given.verbose,
        json_log=given.log_format == "json",
    )
    if options.connections > MOST_CONNECTIONS:
        raise UsageError(f"--connections {options.connections}: {MOST_CONNECTIONS} are the most")
    check_paths(options)
    return options


def _mirror_queue(given: argparse.Namespace) -> int:
    """Return the memory for a mirror's writes in bytes; UsageError where it is too little, or for nothing."""
    if given.mirror_queue is None:
        return MIRROR_QUEUE
    if given.mirror_writes is None:
        raise UsageError("--mirror-queue is for --mirror-writes: leave it out, or say where the writes go")
    size = parse_size(given.mirror_queue, "--mirror-queue")
    if size < LEAST_QUEUE:
        raise UsageError(f"--mirror-queue {given.mirror_queue}: it is 1M at least")
    return size


def parse_backings(texts: list[str]) -> tuple[Address, ...]:
    """Return what --backing was given; UsageError where one is no address, or named twice."""
    found = [parse_backing(text) for text in texts]
    for number, uri in enumerate(found):
        if uri in found[:number]:
            raise UsageError(f"--backing {uri}: it is named twice")
    return tuple(found)


def check_paths(options: Options) -> None:
    """What the options name must be there, and nothing named twice."""
    if not (options.image.is_file() or options.image.is_block_device()):
        what = "it is no file" if options.image.exists() else "there is no such file"
        raise ImageError(f"{options.image}: {what}; make an image with nbd-overlay create")
    new = {"--socket": options.socket, "--qmp": options.monitor, "--pid-file": options.pid_file}
    if options.channel is not None:
        listen = options.channel.listen
        new["--channel"] = listen.removeprefix("unix:") if listen.startswith("unix:") else None
        new["--channel-socket"] = options.channel.socket
        new["--incoming"] = options.channel.incoming
    seen = {os.path.realpath(options.image): "IMAGE"}
    for option, path in new.items():
        if path is None:
            continue
        real = os.path.realpath(path)
        if is_among_devices(real):
            raise UsageError(f"{option} {path}: it is among the devices; name a path in a file system")
        if real in seen:
            raise UsageError(f"{option} {path}: it is the same file as {seen[real]}")
        seen[real] = option
        parent = os.path.dirname(real)
        if not os.path.isdir(parent):
            raise UsageError(f"{option} {path}: there is no directory {parent}")
