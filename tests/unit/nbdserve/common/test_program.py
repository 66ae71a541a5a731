"""What is wrong ends a command with one line."""

from __future__ import annotations

import pytest

from nbdserve.common import program


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
