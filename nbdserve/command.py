"""What the three commands share: one-line errors, exit codes and the argument parser that obeys them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from nbdserve.errors import OperatorError, UsageError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's own words and a pointer to ``--help``."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def run(program: str, body: Callable[[], int]) -> int:
    """Run a command's body and return its exit code, turning expected failures into one line on stderr."""
    try:
        return body()
    except OperatorError as error:
        complain(program, str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`| head`); point stdout elsewhere so that exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(program, f"{where}{error.strerror or error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def complain(program: str, message: str) -> None:
    """Print one line on standard error."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def count(text: str) -> int:
    """A whole number of 0 or more, as an argument's type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return value


def port(text: str) -> int:
    """A TCP port; 0 lets the kernel choose."""
    value = count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, 0 to 65535")
    return value


def patience(text: str) -> float:
    """A time in seconds, up to a day; 0 is none."""
    return 0.0 if text == "0" else seconds(text)


def seconds(text: str) -> float:
    """A time in seconds, more than 0 and up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, more than 0 and up to 86400 seconds")
    return value
