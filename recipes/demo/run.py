"""``nbd-migrate demo``: the six steps on this machine, with a real guest, and the verdict on its disk."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser the demo's options."""
    raise NotImplementedError


def main(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 only when the verdict holds."""
    raise NotImplementedError
