"""``nbd-migrate plan``: what is wrong with its options is told before anybody is asked."""

from __future__ import annotations

import pytest

from recipes.cli.main import main


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_directory_for_the_disks_is_absolute(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is one of B's, which need not be this machine."""
    assert main([command, "--source", "/none.qmp", "--to-dir", "images"]) == 2
    assert capsys.readouterr().err == "nbd-migrate: --to-dir: 'images' must be an absolute path\n"
