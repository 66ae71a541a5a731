"""What is wrong ends a command with one line."""

from __future__ import annotations

import pytest

from nbdserve.common import program
from nbdserve.common.errors import UsageError


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_the_locale_cannot_write_is_one_line(
    encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a path that QEMU tells in UTF-8, where a locale has set another encoding."""

    def body() -> int:
        return len("disk-\u0142\u00f3d\u017a".encode(encoding))

    assert program.run("nbd-migrate", body) == program.EXIT_FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("nbd-migrate: no file can be called '\\u0142")
    assert said.endswith("; set LC_ALL=C.UTF-8\n")


@pytest.mark.parametrize("words", [["--name=--"], ["-n--"], ["--name", ""]])
def test_no_option_has_nothing_as_its_value(words: list[str]) -> None:
    """Python before 3.13 makes an empty list of ``--``, as a directory's or an address's name."""
    parser = program.Parser()
    parser.add_argument("-n", "--name", type=program.filled)
    with pytest.raises(UsageError, match="argument -n/--name"):
        parser.parse_args(words)
    assert parser.parse_args(["--name", "x"]).name == "x"
