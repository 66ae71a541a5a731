"""Becoming somebody with fewer rights, for good."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from nbdserve.common.errors import OperatorError, UsageError


@dataclass(frozen=True)
class Identity:
    """A user and group by number, and the supplementary groups that go with them."""

    user: int
    group: int
    supplementary: tuple[int, ...]


def identity(user: str | None, group: str | None) -> Identity | None:
    """Tell who ``--user`` and ``--group``, each a name or a number, mean; None when neither is given.

    A user brings its own group and supplementary groups, unless a group is given, which then is the only one.
    UsageError when there is no such user or group.
    """
    if user is None and group is None:
        return None
    entry = None if user is None else _user(user)
    if group is not None:
        number = _group(group)
        return Identity(os.geteuid() if entry is None else entry.pw_uid, number, (number,))
    assert entry is not None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Identity(entry.pw_uid, entry.pw_gid, tuple(groups))


def become(who: Identity) -> None:
    """Drop all other rights, in every thread; OperatorError when this process may not."""
    if (who.user, who.group) == (os.geteuid(), os.getegid()) == (os.getuid(), os.getgid()) and who.user:
        return
    try:
        os.setgroups(who.supplementary)
        os.setresgid(who.group, who.group, who.group)
        os.setresuid(who.user, who.user, who.user)
    except PermissionError as error:
        raise OperatorError("--user and --group: only root can become somebody else") from error


def _user(text: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except (KeyError, OverflowError, ValueError) as error:
        raise UsageError(f"--user {text}: there is no such user") from error


def _group(text: str) -> int:
    try:
        return grp.getgrgid(int(text)).gr_gid if text.isdecimal() else grp.getgrnam(text).gr_gid
    except (KeyError, OverflowError, ValueError) as error:
        raise UsageError(f"--group {text}: there is no such group") from error
