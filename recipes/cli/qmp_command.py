"""``nbd-migrate qmp``: one QMP command from the shell, or the same one again until it says what is wanted."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

from nbdserve.common import clock
from nbdserve.common.clock import now
from nbdserve.common.errors import UsageError
from nbdserve.common.program import EXIT_DONE
from recipes.errors import MigrationError
from recipes.plans.plan import check_monitor
from recipes.qemu.vm import VmSilentError, connect

INTERVAL = 0.1  # seconds between two looks


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser its options."""
    parser.description = "Execute a QMP command and print what it returns, as JSON on one line."
    parser.add_argument("monitor", help="a QEMU's QMP address: a socket's absolute path, or HOST:PORT")
    parser.add_argument("command", help="the command's name, as in QEMU's QMP reference")
    parser.add_argument(
        "arguments",
        nargs="?",
        type=_arguments,
        default={},
        metavar="JSON",
        help="its arguments, a JSON object",
    )
    parser.add_argument(
        "--get",
        metavar="PATH",
        help="print only this part, as plain text: keys joined by dots; in a list a number, an id or *",
    )
    parser.add_argument("--until", metavar="A|B", help="repeat the command until --get yields one of these")
    parser.add_argument("--unless", metavar="A|B", help="and fail as soon as it yields one of these")
    parser.add_argument(
        "--timeout", type=_seconds, default=15.0, metavar="S", help="seconds, in all (default: %(default)g)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code.

    Raises UsageError, ConnectError or MigrationError with one line, also when the QEMU ends while it is
    waited for or the time is over.
    """
    if (arguments.until or arguments.unless) and not arguments.get:
        raise UsageError("--until and --unless look at what --get yields: add it")
    check_monitor("MONITOR", arguments.monitor)
    work = _repeat(arguments) if arguments.until else _execute(arguments)
    print("\n".join(clock.run(work)))
    return EXIT_DONE


async def _execute(given: argparse.Namespace) -> list[str]:
    """Execute the command once; return the lines to print."""
    vm = await connect("QEMU", given.monitor, limit=given.timeout, command_limit=given.timeout)
    try:
        value = await vm.call(given.command, given.arguments)
    finally:
        await vm.disconnect()
    return list(_parts(value, given.get)) if given.get else [json.dumps(value)]


async def _repeat(given: argparse.Namespace) -> list[str]:
    """Execute it again and again. In between the monitor, which serves one client at a time, is free."""
    wanted, feared = _alternatives(given.until), _alternatives(given.unless)
    deadline = now() + given.timeout
    while True:
        found = await _execute(given)
        what = f"{given.command}: {given.get} is {' '.join(found) or 'absent'}"
        if wanted.intersection(found):
            return found
        if feared.intersection(found):
            raise MigrationError(f"{given.monitor}: {what}")
        if now() > deadline:
            raise VmSilentError(f"{given.monitor}: after {given.timeout:g} s {what}, not yet {given.until}")
        await asyncio.sleep(INTERVAL)


def _parts(value: Any, path: str) -> Iterator[str]:
    """Return what lies at the path, a line each; nothing where the last key is absent.

    Raises MigrationError if the way there does not exist.
    """
    head, _, rest = path.partition(".")
    if isinstance(value, list) and head == "*":
        for item in value:
            yield from _parts(item, rest) if rest else iter([_text(item)])
        return
    if isinstance(value, list):
        found = [item for index, item in enumerate(value) if head == str(index) or head in _names(item)]
    elif isinstance(value, Mapping):
        found = [value[head]] if head in value else []
    else:
        raise MigrationError(f"there is no {path} in {json.dumps(value)}")
    if not found and (rest or isinstance(value, list)):
        raise MigrationError(f"there is no {head} in {json.dumps(value)[:200]}")
    for item in found[:1]:
        yield from _parts(item, rest) if rest else iter([_text(item)])


def _names(item: Any) -> set[object]:
    """Return what the items of QEMU's lists are known by."""
    return {item.get(key) for key in ("id", "device", "node-name")} if isinstance(item, Mapping) else set()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _alternatives(text: str | None) -> set[str]:
    return set(text.split("|")) if text else set()


def _arguments(text: str) -> dict[str, Any]:
    """Parse the JSON object on the command line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is wanted")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not value > 0:
        raise argparse.ArgumentTypeError("more than 0 seconds are needed")
    return value
