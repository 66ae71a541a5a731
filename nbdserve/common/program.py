"""What the three commands share: one-line errors, exit codes and the argument parser that obeys them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nbdserve.common import standard_streams
from nbdserve.common.errors import OperatorError, UsageError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class HelpFormatter(argparse.HelpFormatter):
    """Options as Python 3.13 shows them, in every version."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """An option's names, and after the last of them its value: ``-x, --export-name NAME``."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class RawHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same, and descriptions as they stand."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line instead of a page of usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """The arguments are argparse's."""
        super().__init__(*arguments, **{"formatter_class": HelpFormatter, **options})

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Do as argparse does, but refuse what is not known: a subcommand itself does, by its own name."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse ``--option=--``, of which Python before 3.13 makes an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "'--' is no value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's own words and a pointer to ``--help``.

        An option that there is not is named first: argparse speaks only of what is missing beside it.
        """
        if "required" in message and (unknown := self._unknown()):
            message = f"unrecognized arguments: {' '.join(unknown)}"
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _unknown(self) -> list[str]:
        """Return the options that were given, and are none of this command's."""
        known = self._option_string_actions
        words = itertools.takewhile(lambda word: word != "--", self._given)
        if self._subparsers:
            # What stands behind a subcommand's name is that one's.
            words = itertools.takewhile(lambda word: word[:1] in self.prefix_chars, words)
        return [
            word
            for word in words
            if len(word) > 1
            and word[0] in self.prefix_chars
            # An option may be cut short, and a value may follow without a space.
            and not any(each.startswith(word.partition("=")[0]) for each in known)
            and word[:2] not in known
        ]


def run(program: str, body: Callable[[], int]) -> int:
    """Run a command's body and return its exit code, turning expected failures into one line on stderr.

    What the body has printed is out by then; where that failed the exit code is not 0. Only a reader that has
    gone (`| head`) is no news to anybody.
    """
    standard_streams.prepare()
    code = _attempt(program, body)
    lost = standard_streams.trouble_of(sys.stdout)
    if lost is not None:
        code = code or _fail(program, lost)
    standard_streams.trouble_of(sys.stderr)
    return code


def _attempt(program: str, body: Callable[[], int]) -> int:
    try:
        return body()
    except SystemExit as end:
        # argparse's, after --help and --version.
        return end.code if isinstance(end.code, int) else EXIT_DONE
    except OperatorError as error:
        complain(program, str(error))
        return error.exit_code
    except OSError as error:
        return _fail(program, error)
    except UnicodeEncodeError as error:
        # A name that has come from elsewhere, as from QEMU, in a locale that has no such letters.
        letters, encoding = error.object[error.start : error.end], error.encoding
        complain(program, f"no file can be called {letters!a} in the encoding {encoding}; set LC_ALL=C.UTF-8")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _fail(program: str, error: OSError) -> int:
    if not (isinstance(error, BrokenPipeError) and error.filename == standard_streams.OUTPUT):
        where = f"{error.filename}: " if error.filename else ""
        complain(program, f"{where}{error.strerror or error}")
    return EXIT_FAILED


def complain(program: str, message: str) -> None:
    """Print one line on standard error."""
    tell(f"{program}: {' '.join(message.split())}")


def tell(text: str, end: str = "\n") -> None:
    """Print something on standard error, if that takes it."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def filled(given: str) -> str:
    """Return an argument of at least one character, as its type: what a script left empty is not left out."""
    if not given:
        raise argparse.ArgumentTypeError("it is empty; give it a value, or leave it out")
    return given


def filled_path(given: str) -> Path:
    """Return the path of a file or directory, as an argument's type; an empty one is not "here"."""
    return Path(filled(given))


def count(text: str) -> int:
    """Return a whole number of 0 or more, as an argument's type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Return a whole number of 1 or more."""
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return value


def port(text: str) -> int:
    """Return a TCP port; 0 lets the kernel choose."""
    value = count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, 0 to 65535")
    return value


def patience(text: str) -> float:
    """Return a time in seconds, up to a day; 0 is none."""
    return 0.0 if text == "0" else seconds(text)


def seconds(text: str) -> float:
    """Return a time in seconds, more than 0 and up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, more than 0 and up to 86400 seconds")
    return value


def allow_many_descriptors() -> None:
    """Let this process have as many descriptors as it may.

    Each client is one, and the soft limit is still what select(2) needs, which nobody here calls.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
