"""Files of keys that are shared beforehand: what is read from them, and what is said of bad ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nbdserve.common.errors import UsageError
from nbdserve.connection.psk import psk_context, read_keys


def test_users_and_keys_are_read_as_gnutls_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:00112233445566778899aabbccddeeff\r\n\n b:o:b:FFEEDDCC \n#c3a9:00112233")
    assert read_keys(path) == {
        "alice": bytes.fromhex("00112233445566778899aabbccddeeff"),
        "b:o:b": b"\xff\xee\xdd\xcc",
        "é": b"\x00\x11\x22\x33",
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "there is no key in it; make one with psktool"),
        ("alice\n", "line 1: write USER:KEY"),
        (":0011223344\n", "line 1: write USER:KEY"),
        ("a:0011223344\nalice:secret\n", "line 2: write USER:KEY"),
        ("#zz:0011223344\n", "line 1: write USER:KEY"),
        ("#ff:0011223344\n", "line 1: write USER:KEY"),
        ("alice:\n", "the key has 0 bytes, and must have 4 to 256"),
        (f"alice:{'00' * 257}\n", "the key has 257 bytes"),
        (f"{'a' * 129}:0011223344\n", "the user has 129 bytes"),
        ("a:0011223344\na:5566778899\n", "line 2: user 'a' is there twice"),
    ],
)
def test_a_file_that_is_no_good_is_refused_in_a_line_that_holds_no_key(
    tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        read_keys(path)
    assert str(refused.value).startswith(f"--tls-psk {path}")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(key in str(refused.value) for key in ("0011223344", "5566778899", "secret"))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(UsageError, match="Is a directory"):
        read_keys(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read_keys(tmp_path / "binary")


@pytest.mark.timeout(60)
def test_a_pipe_in_the_files_place_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(UsageError, match=r"--tls-psk .*/keys: not a regular file"):
        read_keys(tmp_path / "keys")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python can do this")
def test_before_python_3_13_one_line_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--tls-psk needs Python 3\.13, and this is 3\.\d+: use cert"):
        psk_context(tmp_path / "keys")
