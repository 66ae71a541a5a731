"""``python -m tests.support.manual PAGE``: write what every command's ``--help`` says as one page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    ("nbdserve",),
    ("nbdserve", "channel"),
    ("nbdserve", "channel", "--listen", "PLACE"),
    ("nbdserve", "channel", "--ram", "unix:PATH"),
    ("nbd-overlay",),
    ("nbd-overlay", "create"),
    ("nbd-overlay", "discard"),
    ("nbd-overlay", "info"),
    ("nbd-overlay", "check"),
    ("nbd-overlay", "map"),
    ("nbd-overlay", "serve"),
    ("nbd-overlay", "stream"),
    ("nbd-overlay", "status"),
    ("nbd-overlay", "pause"),
    ("nbd-overlay", "resume"),
    ("nbd-overlay", "speed"),
    ("nbd-overlay", "wait"),
    ("nbd-overlay", "activate"),
    ("nbd-overlay", "invalidate"),
    ("nbd-overlay", "channel-done"),
    ("nbd-overlay", "quit"),
    ("nbd-overlay", "verify"),
    ("nbd-overlay", "commit"),
    ("nbd-migrate",),
    ("nbd-migrate", "plan"),
    ("nbd-migrate", "run"),
    ("nbd-migrate", "finish"),
    ("nbd-migrate", "list"),
    ("nbd-migrate", "status"),
    ("nbd-migrate", "speed"),
    ("nbd-migrate", "report"),
    ("nbd-migrate", "resume"),
    ("nbd-migrate", "recover"),
    ("nbd-migrate", "abort"),
    ("nbd-migrate", "cleanup"),
    ("nbd-migrate", "demo"),
    ("nbd-migrate", "pivot"),
    ("nbd-migrate", "qmp"),
)


def page() -> str:
    """The page, as Markdown."""
    parts = ["# Commands\n\nWritten by `make docs` from what each command's `--help` says.\n"]
    for words in COMMANDS:
        parts.append(f"\n## {' '.join(words)}\n\n```text\n{help_of(words)}```\n")
    return "".join(parts)


def help_of(words: tuple[str, ...]) -> str:
    """The output of ``--help``, at the same width everywhere."""
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run(
        [program, *words[1:], "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "110", "NO_COLOR": "1"},
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines()) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
