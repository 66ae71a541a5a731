"""``python -m tests.fuzz.coverage TARGET CORPUS [libFuzzer options]``: coverage-guided, with atheris."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

from tests.support import wire

with atheris.instrument_imports(include=["nbdserve"]):
    from nbdserve.protocol.offers import Mode
    from tests.fuzz import targets

TARGETS: dict[str, Callable[[bytes], object]] = {
    "haggle": targets.haggle,
    "transmit": targets.transmit,
    "channel": targets.channel,
    "greet": targets.greet,
}


def seeds(target: str) -> Sequence[bytes]:
    """Inputs to begin with, so that the fuzzer need not guess the magic numbers."""
    if target == "haggle":
        flags = struct.pack(">I", 3)
        meta = wire.meta_query("disk", "base:allocation", "base:")
        options = [
            wire.option(wire.Option.STRUCTURED_REPLY),
            wire.option(wire.Option.LIST),
            wire.option(wire.Option.LIST_META_CONTEXT, meta),
            wire.option(wire.Option.SET_META_CONTEXT, meta),
            wire.option(wire.Option.INFO, wire.export_query("disk", (1, 2, 3))),
            wire.option(11),
            wire.option(wire.Option.STARTTLS),
            wire.option(wire.Option.GO, wire.export_query("disk")),
            wire.option(wire.Option.EXPORT_NAME, b"disk"),
            wire.option(wire.Option.ABORT),
        ]
        return [flags + option for option in options] + [flags + b"".join(options)]
    if target == "channel":
        return [bytes([choice]) + targets.channel_seed(choice) for choice in range(16)]
    if target == "greet":
        return [targets.HELLO + bytes(64), targets.HELLO + bytes(160)]
    # Without DISC, so that what follows is served too; the fuzzer finds it soon enough.
    commands = [command for command in wire.Command if command != wire.Command.DISC]
    payloads = {wire.Command.WRITE: b"x" * 16}
    compact = [
        wire.request(command, 512, 4096, cookie=7, data=payloads.get(command, b"")) for command in commands
    ]
    payloads[wire.Command.BLOCK_STATUS] = struct.pack(">QI", 4096, 1)
    extended = [
        wire.extended_request(command, 512, 4096, cookie=7, data=payloads.get(command, b""))
        for command in commands
    ]
    found = []
    for choice in range(0, 256, 5):
        requests = extended if targets.mode_of(choice) is Mode.EXTENDED else compact
        found += [bytes([choice]) + b"".join(requests), bytes([choice]) + requests[choice % len(requests)]]
    return found


def main(arguments: Sequence[str]) -> None:
    """Fuzz until libFuzzer's own limits (``-runs=N``, ``-max_total_time=S``) are reached."""
    target, corpus, *options = arguments
    directory = Path(corpus)
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (directory / f"seed-{number}").write_bytes(seed)

    def run(data: bytes) -> None:
        TARGETS[target](data)

    atheris.Setup([sys.argv[0], str(directory), "-max_len=4096", "-timeout=10", *options], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
