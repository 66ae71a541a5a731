"""What the operator names: a token's file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.channel.places import read_token
from nbdserve.common.errors import UsageError


def test_a_token_is_what_is_in_its_file_without_white_space_around_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_bytes(b" \t" + b"ab" * 16 + b"\r\n")
    assert read_token(path) == b"ab" * 16


def test_a_pipe_is_no_token_file_and_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "token"
    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match="not a regular file"):
        read_token(path)
