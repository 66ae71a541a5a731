"""``nbd-overlay serve``: an overlay as an NBD export, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.client import Target
from nbdserve.common import logs, program
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import Ownership
from nbdserve.connection.handshake import Terms
from nbdserve.connection.listeners import Listener, listen_unix
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.service import daemonize
from nbdserve.service.notify import ServiceManager
from nbdserve.service.pid_file import PidFile
from nbdserve.service.server import Server
from overlay.backing.failover import Sources
from overlay.backing.seed import Seed
from overlay.channel.address import MigrateUri, parse_backing
from overlay.daemon import Daemon
from overlay.formats.image import Image
from overlay.formats.open import open_image, real_path
from overlay.options import Options

if TYPE_CHECKING:
    from overlay.channel.end import Channel

PROGRAM = "nbd-overlay"
_LOG = logging.getLogger(PROGRAM)


def serve(options: Options) -> int:
    """Serve the overlay; returns the exit code when the server has ended in good order.

    Raises OperatorError when the image cannot be opened, or nobody can listen on the socket.
    """
    _start_log(options, logging.StreamHandler())
    with contextlib.ExitStack() as stack:
        announce = _detach(stack, options)
        pid_file = stack.enter_context(PidFile(options.pid_file))
        exports = Exports()
        stack.callback(exports.close)
        daemon = _put_together(options)
        exports.add(Export(options.name, daemon.overlay))
        stack.callback(daemon.stop)
        listener = _listen(stack, options.socket, options.socket_owner)
        monitor = None if options.monitor is None else _listen(stack, options.monitor, options.monitor_owner)
        policy = Policy(
            timed=options.metrics is not None, terms=Terms(structured_replies=options.structured_replies)
        )
        manager = ServiceManager(os.environ)
        server = Server(exports, [listener], policy, manager)
        server.stop_on_signals()
        _attach(stack, server, daemon, monitor, pid_file)
        daemon.start()
        _LOG.info("serving %s on %s", options.image, listener)
        announce()
        manager.tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS=serving {options.image}")
        server.run()
    return program.EXIT_DONE if exports.intact else program.EXIT_FAILED


def receive(options: Options) -> int:
    """Take a guest's writes over into a mirror's image; returns the exit code when that has ended.

    Raises OperatorError when the image cannot be opened, or nobody can listen on the socket.
    """
    # Only now: they take memory that others need not have.
    from overlay.formats.flat.image import FlatImage
    from overlay.formats.redo.beside import opened, point_text
    from overlay.mirror.target import MirrorTarget

    _start_log(options, logging.StreamHandler())
    with contextlib.ExitStack() as stack:
        announce = _detach(stack, options)
        pid_file = stack.enter_context(PidFile(options.pid_file))
        image = open_image(
            options.image, writable=True, layout="flat", map_file=options.map_file, receiving=True
        )
        stack.callback(image.close)
        if not isinstance(image, FlatImage):
            raise ImageError(
                f"{options.image}: a complete disk, and no mirror: make one with nbd-overlay create"
            )
        log = stack.enter_context(opened(image))
        exports = Exports([Export(options.name, MirrorTarget(log))])
        stack.callback(exports.close)
        listener = _listen(stack, options.socket, options.socket_owner)
        manager = ServiceManager(os.environ)
        server = Server(exports, [listener], Policy(), manager)
        server.stop_on_signals()
        pid_file.publish()
        _LOG.info("%s receives on %s: %s", options.image, listener, point_text(log.point))
        announce()
        manager.tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS=mirroring into {options.image}")
        server.run()
    return program.EXIT_DONE if exports.intact else program.EXIT_FAILED


def _put_together(options: Options) -> Daemon:
    """Open the image and prepare what it needs; nothing is connected to yet."""
    image = open_image(
        options.image,
        writable=True,
        layout=options.layout,
        map_file=options.map_file,
        size=options.size,
    )
    channel = None
    try:
        options = _as_things_are(options, image)
        channel = _channel(image, options)
        sources = _sources(image, options, channel)
        # One that is complete has been verified by who has completed it, or need not be.
        if options.verify and not image.records_writer and not image.complete:
            raise ImageError(
                f"{options.image}: its layout does not record what the guest writes, so that a copy in it "
                "cannot be verified; leave out --verify, or use the flat layout"
            )
        options = _mirrored(options, image)
        seed = None
        if options.seed is not None:
            path = real_path(options.image)
            seed = Seed(options.seed, path, Path(image.map_path or path))
    except BaseException:
        if channel is not None:
            channel.close()
        image.close()
        raise
    return Daemon(image, sources, options, seed, channel)


def _mirrored(options: Options, image: Image) -> Options:
    """Without a mirror, where the image is complete: nobody knows any more what the guest has written.

    ImageError where its layout has never known that.
    """
    if options.mirror is None or image.records_writer:
        return options
    if not image.complete:
        raise ImageError(
            f"{options.image}: its layout does not record what the guest writes, so that it cannot be "
            "mirrored; leave out --mirror-writes, or use the flat layout"
        )
    _LOG.warning("%s is complete: what the guest writes is not mirrored any more", options.image)
    return replace(options, mirror=None)


def _as_things_are(options: Options, image: Image) -> Options:
    """Where the guest comes through a channel, the image is armed until then."""
    waits = options.channel is not None and not options.pre_copy and not _has_arrived(options, image)
    return replace(options, armed=True) if waits else options


def _has_arrived(options: Options, image: Image) -> bool:
    """Whether the guest is certainly here already, as this process was started again.

    Before, nothing is kept but what pre-copy copies.
    """
    return image.complete or bool(image.written_bytes if options.pre_copy else image.local_bytes)


def _channel(image: Image, options: Options) -> Channel | None:
    """The channel, where there is to be one. Raises UsageError where it and the backings do not fit."""
    backings = options.backings or [parse_backing(backing.name) for backing in image.backings]
    through = [each for each in backings if isinstance(each, MigrateUri)]
    if options.channel is None:
        if through:
            raise UsageError(
                f"{options.image}: its backing {through[0]} comes through a channel: add "
                "--channel listen:PLACE and --token-file FILE"
            )
        return None
    if backings and not through:
        raise UsageError(
            f"{options.image}: its backing is {backings[0]}, which comes through no channel: leave out "
            "--channel, or name --backing migrate:NAME"
        )
    # Only now: it takes memory that others need not have.
    from overlay.channel.end import Channel

    return Channel(options.channel, arrived=_has_arrived(options, image))


def _sources(image: Image, options: Options, channel: Channel | None) -> Sources:
    backings = options.backings or [parse_backing(backing.name) for backing in image.backings]
    if options.backings and not image.backings:
        raise UsageError(f"{options.image}: everything is in the image: leave out --backing")
    targets: list[Target] = []
    for each in backings:
        if not isinstance(each, MigrateUri):
            targets.append(each)
        elif channel is not None:
            targets.append(channel.through(each))
    sources = Sources(
        targets,
        image.size,
        connections=options.connections,
        patience=options.patience,
        is_awaited=lambda: channel is None or channel.is_awaited,
    )
    if not (options.armed or options.pre_copy):
        sources.samples.recall(image)
    return sources


def _listen(stack: contextlib.ExitStack, path: str, whose: Ownership) -> Listener:
    listener = listen_unix(path, whose)
    stack.callback(listener.close)
    return listener


def _attach(
    stack: contextlib.ExitStack, server: Server, daemon: Daemon, monitor: Listener | None, pid_file: PidFile
) -> None:
    """What goes on beside the server. Their modules cost memory where they are not used."""
    options = daemon.options
    if options.metrics is not None:
        from nbdserve.monitor import metrics
        from overlay.monitor.metrics import Collector

        stack.enter_context(metrics.served(Collector(server, daemon), *options.metrics))
    pid_file.publish()
    if monitor is not None:
        from overlay.monitor import control

        stack.enter_context(control.served(server, daemon, monitor))


def _detach(stack: contextlib.ExitStack, options: Options) -> Callable[[], None]:
    """Go to the background, if asked to; returns what lets the command that the operator typed return."""
    if not options.daemonize:
        return lambda: None
    background = stack.enter_context(daemonize.background([]))

    def announce() -> None:
        _start_log(options, logs.system_log())
        background.ready()

    return announce


def _start_log(options: Options, handler: logging.Handler) -> None:
    logs.start(PROGRAM, handler, as_json=options.json_log, verbose=options.verbose)
