"""Whose a socket or a file is that is made here, and who may use it."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.errors import OperatorError, UsageError


@dataclass(frozen=True)
class Ownership:
    """A mode, and the numbers of a user and a group; None means as it comes."""

    mode: int | None = None
    user: int | None = None
    group: int | None = None

    def __bool__(self) -> bool:
        return self != Ownership()

    @property
    def gives_away(self) -> bool:
        """Tell whether somebody else may become the owner."""
        return self.user is not None or self.group is not None

    def apply(self, descriptor: int, name: str | Path) -> None:
        """Give an open file, which may be opened with O_PATH, its owner and then its mode.

        It should have fewer rights before, so that there is no moment in which it has more. Raises
        OperatorError, which calls the file ``name``, when this process may not do so.
        """
        # A descriptor by its name works with O_PATH too, and is no other file than the one that was opened.
        place = f"/proc/self/fd/{descriptor}"
        try:
            if self.gives_away:
                numbers = (-1 if number is None else number for number in (self.user, self.group))
                os.chown(place, *numbers)
            if self.mode is not None:
                os.chmod(place, self.mode)
        except OSError as error:
            whom = ":".join("" if number is None else str(number) for number in (self.user, self.group))
            what = (
                f"cannot be given to {whom.rstrip(':')}"
                if self.gives_away
                else f"cannot get mode {self.mode:04o}"
            )
            raise OperatorError(f"{name}: {what}: {error.strerror}; only root can give files away") from error


_LAST = (1 << 32) - 2
"""The largest number of a user or a group; the next one asks chown(2) to change nothing."""

PRIVATE = Ownership(0o600)
"""Nobody but who has made it."""


def add_options(add: Callable[..., object], option: str, what: str) -> None:
    """Give a parser, by its ``add_argument``, the two options that ``ownership`` reads."""
    add(f"{option}mode", metavar="MODE", help=f"mode of {what}, octal (default: 0600)")
    add(f"{option}owner", metavar="USER[:GROUP]", help=f"owner of {what} (default: who starts this)")


def ownership(mode: str | None, owner: str | None, option: str) -> Ownership:
    """Return what ``--OPTION-mode`` (octal) and ``--OPTION-owner`` (USER, USER:GROUP or :GROUP) ask for.

    Raises UsageError for what is no mode, and where there is no such user or group.
    """
    user, _, group = (owner or "").partition(":")
    return Ownership(
        None if mode is None else parse_mode(mode, f"{option}mode"),
        _user(user, owner, option) if user else None,
        _group(group, owner, option) if group else None,
    )


def parse_mode(text: str, option: str) -> int:
    """Return a file's mode, in octal as for chmod, without what is special; UsageError."""
    if not text or set(text) - set("01234567") or int(text, 8) > 0o777:
        raise UsageError(f"{option} {text}: write an octal mode up to 0777, such as 0660")
    return int(text, 8)


def _user(name: str, owner: str | None, option: str) -> int:
    try:
        return _number(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError) as error:
        raise UsageError(f"{option}owner {owner}: there is no user {name}") from error


def _group(name: str, owner: str | None, option: str) -> int:
    try:
        return _number(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        raise UsageError(f"{option}owner {owner}: there is no group {name}") from error


def _number(text: str) -> int:
    """The number of a user or a group; ValueError for one that nobody can have."""
    number = int(text)
    if number > _LAST:
        raise ValueError(text)
    return number
