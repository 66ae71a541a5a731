"""Whose sockets and files are, and that nobody may use them before they are what they should be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbdserve.common.errors import OperatorError, UsageError
from nbdserve.common.ownership import PRIVATE, Ownership, ownership
from nbdserve.connection.listeners import listen_unix

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode_of(path: Path) -> int:
    """The rights at a path."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o000, 0o777])
def test_a_socket_has_its_mode_from_the_beginning(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        listener = listen_unix(str(tmp_path / "socket"), Ownership(mode))
    finally:
        assert os.umask(before) == 0o077
    assert mode_of(tmp_path / "socket") == mode
    listener.close()


def test_a_socket_is_private_unless_something_else_is_said(tmp_path: Path) -> None:
    listener = listen_unix(str(tmp_path / "socket"))
    assert mode_of(tmp_path / "socket") == 0o600
    listener.close()


@AS_ROOT
def test_nobody_may_use_a_socket_before_it_has_its_owner_and_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, chown, chmod = tmp_path / "socket", os.chown, os.chmod
    seen: list[tuple[int, int]] = []

    def looking_chown(place: str, user: int, group: int) -> None:
        seen.append((path.stat().st_uid, mode_of(path)))
        chown(place, user, group)

    def looking_chmod(place: str, mode: int) -> None:
        seen.append((path.stat().st_uid, mode_of(path)))
        chmod(place, mode)

    monkeypatch.setattr("os.chown", looking_chown)
    monkeypatch.setattr("os.chmod", looking_chmod)
    listener = listen_unix(str(path), Ownership(0o660, 65534, 65533))
    assert seen == [(0, 0), (65534, 0)]
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode_of(path)) == (65534, 65533, 0o660)
    listener.close()
    assert not path.exists()


@AS_ROOT
def test_an_owner_alone_leaves_a_socket_private(tmp_path: Path) -> None:
    listener = listen_unix(str(tmp_path / "socket"), Ownership(user=65534))
    assert mode_of(tmp_path / "socket") == PRIVATE.mode
    listener.close()


def test_a_socket_that_cannot_be_given_away_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.chown", refuse)
    complaint = "unix:.*/socket: cannot be given to 65534: Operation not permitted; only root can give"
    with pytest.raises(OperatorError, match=complaint):
        listen_unix(str(tmp_path / "socket"), Ownership(user=65534))
    assert list(tmp_path.iterdir()) == []


def test_owners_are_names_or_numbers_as_for_chown() -> None:
    assert ownership(None, None, "--x-") == Ownership()
    assert ownership("0660", "root", "--x-") == Ownership(0o660, 0)
    assert ownership("7", "0:0", "--x-") == Ownership(7, 0, 0)
    assert ownership(None, ":4242", "--x-") == Ownership(None, None, 4242)
    assert ownership(None, "4294967294", "--x-") == Ownership(None, 4294967294)


@pytest.mark.parametrize(
    ("mode", "owner", "complaint"),
    [
        ("rw", None, "--x-mode rw: write an octal mode up to 0777, such as 0660"),
        ("", None, "--x-mode : write"),
        ("4755", None, "--x-mode 4755: write"),
        ("-1", None, "--x-mode -1: write"),
        (None, "no-such-user", "--x-owner no-such-user: there is no user no-such-user"),
        (None, "root:no-such", "--x-owner root:no-such: there is no group no-such"),
        # chown(2) takes the last number of 32 bits for "leave it as it is".
        (None, "4294967295", "--x-owner 4294967295: there is no user 4294967295"),
        (None, ":4294967295", "--x-owner :4294967295: there is no group 4294967295"),
        (None, "4294967296:0", "--x-owner 4294967296:0: there is no user 4294967296"),
        (None, "0:" + "1" * 5000, "there is no group 111"),
    ],
)
def test_what_cannot_be_is_refused(mode: str | None, owner: str | None, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ownership(mode, owner, "--x-")
