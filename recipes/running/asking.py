"""How another process asks something of a run.

The monitors are the run's, so a wish lies as a small file in the migration's directory, where the run finds
it when it looks how far it is. It gives the file another name when it has taken it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recipes.errors import MigrationError
from recipes.migrate.journal import open_regular

LOOK = 0.1
"""Seconds between two looks whether it was taken."""

SOON = 2.0
"""Seconds after which who asks is told what the run is at, if it has not taken it by then."""

_LONGEST = 4096


@dataclass(frozen=True)
class Wish:
    """What the files are called: while it is asked for, and once it was taken."""

    asked: str
    taken: str


class Known(Protocol):
    """What is to be known of a migration of which something is asked."""

    def actor(self) -> int:
        """Return the process that acts on it: its id, 0 if nobody does, or less where it is not known."""

    def doing(self) -> str:
        """Return what it does, for the operator."""


def text(directory: Path, name: str) -> str:
    """Return what a file in the directory of a migration says; nothing where there is none, or no text."""
    try:
        with os.fdopen(open_regular(directory / name, os.O_RDONLY), "rb") as file:
            return file.read(_LONGEST).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def take(directory: Path, wish: Wish, mark: str, is_it: Callable[[str], bool]) -> bool:
    """Say that what was asked is done; what was asked in the same instant is asked still.

    ``mark`` is no other wish's, ``is_it`` tells whether a file of this name has the wish that was done.
    Returns False where it was asked no more.
    """
    ours = directory / f"{wish.taken}.{mark}"
    with suppress(OSError):
        # Another name of what is there now: the first one may be another wish's at any time.
        os.link(directory / wish.asked, ours)
        if not is_it(ours.name):
            ours.unlink()
            return False
        ours.replace(directory / wish.taken)
        with suppress(OSError):
            if is_it(wish.asked):
                (directory / wish.asked).unlink()
        return True
    return False


def withdraw(directory: Path, wish: Wish, asked: str) -> None:
    """Ask it no more."""
    if text(directory, wish.asked) == asked:
        with suppress(OSError):
            (directory / wish.asked).unlink()


def ask(
    directory: Path,
    wish: Wish,
    asked: str,
    known: Known,
    patience: float,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Ask it, in words that nobody else uses, and wait until it was taken, for ``patience`` seconds.

    Where that is not soon, what is waited for is given to ``tell``. Raises MigrationError when nobody is at
    work, or does not take it: then it is asked no more.
    """
    name = directory.name
    if not known.actor():
        raise MigrationError(
            f"nobody is at work on {name}, so nothing was changed: nbd-migrate resume {name} takes it up"
        )
    path, fresh = directory / wish.asked, directory / f"{wish.asked}.{os.urandom(8).hex()}"
    try:
        try:
            fresh.write_text(asked)
            fresh.replace(path)
        except OSError as error:
            raise MigrationError(f"{path}: {error.strerror}") from error
        _wait_until_taken(directory, wish, asked, known, patience, sleep, tell)
    except BaseException as error:
        # Also an operator who does not wait for it any more: later nobody would expect it.
        with suppress(OSError):
            fresh.unlink()
        withdraw(directory, wish, asked)
        _wait_while_it_is_taken(directory, wish, asked, sleep)
        if not isinstance(error, MigrationError) or text(directory, wish.taken) != asked:
            raise
        # Just now.
    if text(directory, wish.taken) != asked:
        raise MigrationError(f"{name}: something else was asked meanwhile, which counts")


def _wait_while_it_is_taken(directory: Path, wish: Wish, asked: str, sleep: Callable[[float], None]) -> None:
    """Wait, in the instant between the two names that a run gives to what it takes."""
    for _ in range(round(SOON / LOOK)):
        if not any(text(directory, each.name) == asked for each in directory.glob(f"{wish.taken}.*")):
            return
        sleep(LOOK)


def _wait_until_taken(
    directory: Path,
    wish: Wish,
    asked: str,
    known: Known,
    patience: float,
    sleep: Callable[[float], None],
    tell: Callable[[str], None],
) -> None:
    name, waited, is_told = directory.name, 0.0, False
    while text(directory, wish.asked) == asked:
        if not known.actor():
            raise MigrationError(f"{name}: the run has ended before it took this, so nothing was changed")
        if waited > patience:
            raise MigrationError(
                f"{name}: the run has not taken this within {patience:g} s, so nothing was changed; it is "
                f"at: {known.doing()}; ask again later"
            )
        if waited > SOON and not is_told:
            is_told = True
            tell(
                f"{name}: the run has not taken this yet, as it is at: {known.doing()}; it has "
                f"{patience - SOON:g} s more, and Ctrl-C withdraws it"
            )
        sleep(LOOK)
        waited += LOOK
