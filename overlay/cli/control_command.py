"""The subcommands that talk to a running daemon: ``stream``, ``status``, ``pause``, ``wait`` and so on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from nbdserve.cli.config import monitor_path
from nbdserve.common import clock
from nbdserve.common.errors import OperatorError, UsageError
from nbdserve.common.program import EXIT_DONE, Parser, RawHelpFormatter, seconds
from nbdserve.common.sizes import parse_size
from overlay.channel.address import parse_backing

INVALIDATE_LIMIT = 60.0
"""Seconds that forgetting ranges may take: it is made durable."""
_TAKING_LEAVE = 5
"""Seconds that the source's end of a channel may take to that."""
_TOGETHER = 20000
"""Ranges in one command, which has a MiB at most."""


def register(commands: argparse._SubParsersAction[Parser], epilog: str) -> None:
    """Add the subcommands to those of nbd-overlay."""
    for name, (command, configure, summary, description) in COMMANDS.items():
        parser = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=RawHelpFormatter,
        )
        parser.add_argument(
            "--qmp",
            required=True,
            metavar="unix:PATH",
            help="the daemon's, as nbd-overlay serve was given it",
        )
        parser.set_defaults(command=command)
        if configure is not None:
            configure(parser)


def configure_stream(parser: argparse.ArgumentParser) -> None:
    """Give ``stream`` its options."""
    parser.add_argument("--speed", metavar="SIZE", help="bytes per second, at most; 0: no limit")


def configure_status(parser: argparse.ArgumentParser) -> None:
    """Give ``status`` its options."""
    parser.add_argument("--json", action="store_true", help="all that is known, as one object on a line")
    parser.add_argument("--watch", action="store_true", help="again each second, until everything is here")


def configure_speed(parser: argparse.ArgumentParser) -> None:
    """Give ``speed`` its argument."""
    parser.add_argument("speed", metavar="SIZE", help="bytes per second, at most; 0: no limit")


def configure_wait(parser: argparse.ArgumentParser) -> None:
    """Give ``wait`` its options."""
    parser.add_argument("--timeout", type=seconds, metavar="S", help="fail after so many seconds")


def configure_invalidate(parser: argparse.ArgumentParser) -> None:
    """Give ``invalidate`` its arguments."""
    parser.add_argument("offset", nargs="?", metavar="OFFSET", help="where the range begins, in bytes")
    parser.add_argument("length", nargs="?", metavar="LENGTH", help="how long it is, in bytes")
    parser.add_argument(
        "--ranges", metavar="FILE", help="instead of one, all ranges in FILE: lines OFFSET LENGTH; -: stdin"
    )
    parser.add_argument(
        "--bitmap", metavar="NAME", help="instead, what the dirty bitmap NAME of an NBD export says is dirty"
    )
    parser.add_argument(
        "--backing", metavar="BACKING", help="where that bitmap is exported (default: the overlay's backing)"
    )


def configure_quit(parser: argparse.ArgumentParser) -> None:
    """Give ``quit`` its options."""
    parser.add_argument("--force", action="store_true", help="even while a guest uses the disk")


def stream(arguments: argparse.Namespace) -> int:
    """Start to stream, at this speed if one is given."""
    speed = {} if arguments.speed is None else {"speed": _speed(arguments.speed)}
    return _execute(arguments, "block-stream", device="stream", **speed)


def pause(arguments: argparse.Namespace) -> int:
    """Let streaming rest."""
    return _execute_on_job(arguments, "block-job-pause")


def resume(arguments: argparse.Namespace) -> int:
    """Let streaming go on."""
    return _execute_on_job(arguments, "block-job-resume")


def speed(arguments: argparse.Namespace) -> int:
    """Change the speed of streaming."""
    return _execute_on_job(arguments, "block-job-set-speed", speed=_speed(arguments.speed))


def activate(arguments: argparse.Namespace) -> int:
    """Say that the guest runs here."""
    return _execute(arguments, "overlay-activate")


def invalidate(arguments: argparse.Namespace) -> int:
    """Forget one range, all those in a file, or what a bitmap says."""
    commands = list(_invalidations(arguments))

    async def forget(monitor: str) -> int:
        from overlay.cli.remote import connected

        async with connected(monitor) as remote:
            for given in commands:
                await remote.execute("overlay-invalidate", given, limit=INVALIDATE_LIMIT)
        return EXIT_DONE

    return _run(arguments, forget)


def end(arguments: argparse.Namespace) -> int:
    """End the daemon, unless a guest uses the disk."""
    return _execute(arguments, "quit", force=arguments.force)


def channel_done(arguments: argparse.Namespace) -> int:
    """Say that the channel's source is needed no more, and wait until it has taken leave."""
    return _execute(arguments, "channel-done", timeout=_TAKING_LEAVE)


def status(arguments: argparse.Namespace) -> int:
    """Show how it goes, once or until everything is here."""
    from overlay.cli import status as show

    if arguments.watch:
        return _run(arguments, lambda monitor: show.watch(monitor, as_json=arguments.json))

    async def look(monitor: str) -> int:
        from overlay.cli.remote import connected

        async with connected(monitor) as remote:
            told = await remote.status()
        print(json.dumps(told) if arguments.json else show.text(told))
        return EXIT_DONE

    return _run(arguments, look)


def wait(arguments: argparse.Namespace) -> int:
    """Wait until everything is here."""
    from overlay.cli import status as show

    return _run(arguments, lambda monitor: show.wait(monitor, arguments.timeout))


Configure = Callable[[argparse.ArgumentParser], None]
Command = Callable[[argparse.Namespace], int]

COMMANDS: dict[str, tuple[Command, Configure | None, str, str]] = {
    "stream": (
        stream,
        configure_stream,
        "copy the whole disk in the background",
        "Tell a daemon to copy all that is missing of the disk; returns at once (see wait).",
    ),
    "status": (
        status,
        configure_status,
        "show how copying goes",
        "Show what a daemon does.",
    ),
    "pause": (
        pause,
        None,
        "let streaming rest",
        "Let streaming rest; guests go on getting what they read.",
    ),
    "resume": (
        resume,
        None,
        "let streaming go on",
        "Let streaming go on, after a pause or after it has stopped with an error.",
    ),
    "speed": (speed, configure_speed, "change the speed of streaming", "Change the speed of streaming."),
    "wait": (
        wait,
        configure_wait,
        "wait until the whole disk is here",
        "Wait until the whole disk is here, and show how it goes. The exit code is 1, with the reason, when "
        "streaming\nfails, is cancelled, or the daemon ends before.",
    ),
    "activate": (
        activate,
        None,
        "say that the guest runs here",
        "Tell a daemon that serves --armed that the guest runs here: what is read from now on is kept.",
    ),
    "invalidate": (
        invalidate,
        configure_invalidate,
        "forget what the guest has changed at the source",
        "Forget ranges that were copied, as the guest has changed them at the source; before it runs here.",
    ),
    "channel-done": (
        channel_done,
        None,
        "say that the source of a migration over one connection is needed no more",
        "Say to the source's end of a channel (serve --channel) that all disks are here; wait for its end.\n"
        "Without --channel-socket it is told so as soon as the disk is complete, and this only waits.",
    ),
    "quit": (
        end,
        configure_quit,
        "end the daemon",
        "End a daemon. It refuses while a client, such as the guest's QEMU, uses the disk: let that\n"
        "pivot to the file (nbd-migrate pivot), or end it, first.",
    ),
}
"""By name: what carries it out, what gives it options, its summary and its description."""


def _speed(text: str) -> int:
    return parse_size(text, "the speed")


def _invalidations(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The arguments of each command that is to be given; UsageError where they make no sense."""
    if arguments.backing is not None and arguments.bitmap is None:
        raise UsageError("--backing says where a --bitmap is: give that, too")
    if arguments.bitmap is None:
        ranges = list(_ranges(arguments))
        for begin in range(0, len(ranges), _TOGETHER):
            yield {"ranges": ranges[begin : begin + _TOGETHER]}
        return
    if arguments.ranges is not None or arguments.offset is not None:
        raise UsageError("--bitmap NAME has all the ranges: leave out OFFSET, LENGTH and --ranges")
    backing = {} if arguments.backing is None else {"backing": str(parse_backing(arguments.backing))}
    yield {"bitmap": arguments.bitmap, **backing}


def _ranges(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is to be forgotten; UsageError where that makes no sense."""
    if arguments.ranges is None:
        if arguments.offset is None or arguments.length is None:
            raise UsageError(
                "what is to be forgotten? Give OFFSET and LENGTH, --ranges FILE or --bitmap NAME"
            )
        yield parse_size(arguments.offset, "OFFSET"), parse_size(arguments.length, "LENGTH")
        return
    if arguments.offset is not None:
        raise UsageError("--ranges FILE has all the ranges: leave out OFFSET and LENGTH")
    name = "standard input" if arguments.ranges == "-" else arguments.ranges
    try:
        text = sys.stdin.read() if arguments.ranges == "-" else Path(arguments.ranges).read_text()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: it is no text") from error
    except OSError as error:
        raise OperatorError(f"{name}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise UsageError(f"{name}, line {number}: write OFFSET LENGTH")
        offset, length = (parse_size(word, f"{name}, line {number}:") for word in words)
        yield offset, length


def _execute(arguments: argparse.Namespace, command: str, **given: object) -> int:
    async def execute(monitor: str) -> int:
        from overlay.cli.remote import connected

        async with connected(monitor) as remote:
            await remote.execute(command, given)
        return EXIT_DONE

    return _run(arguments, execute)


def _execute_on_job(arguments: argparse.Namespace, command: str, **given: object) -> int:
    async def execute(monitor: str) -> int:
        from overlay.cli.remote import connected

        async with connected(monitor) as remote:
            await remote.execute(command, {"device": await remote.job(), **given})
        return EXIT_DONE

    return _run(arguments, execute)


def _run(arguments: argparse.Namespace, work: Callable[[str], Awaitable[int]]) -> int:
    async def run() -> int:
        return await work(monitor)

    monitor = monitor_path(arguments.qmp)
    return clock.run(run())
