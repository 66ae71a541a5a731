"""The file of a flash chip is made where there is none, and nobody else's is taken for ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.runtime import Migration
from recipes.plans.limits import Limits
from recipes.steps.create import create_flash


class Making:
    """As much of a migration as there must be; ``made`` is what it will remove when the guest stays on A."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(made=("/b.raw",))
        self.plan = SimpleNamespace(limits=Limits(), destination=SimpleNamespace(owner="", mode="0640"))
        self.host_b = Host("B")

    def record(self, **changes: Any) -> None:
        """Note it."""
        self.state = SimpleNamespace(**{**vars(self.state), **changes})

    @property
    def made(self) -> tuple[str, ...]:
        """Return what was made, or may have been."""
        return cast(tuple[str, ...], self.state.made)

    def make(self, target: Path) -> None:
        """Make one of 64 KiB."""
        clock.run(create_flash(cast(Migration, self), str(target), 65536))


@pytest.fixture(params=["dash", "bash"])
def shell(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What sh is on the host: each says in its own words that a file is there."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"there is no {request.param} here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to(found)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    return cast(str, request.param)


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, shell: str) -> None:
    making, target = Making(), tmp_path / "vars.fd"
    target.write_text("somebody's")
    with pytest.raises(MigrationError, match=rf"flash.target: {target} cannot be made on B: .*exist"):
        making.make(target)
    assert making.made == ("/b.raw",)
    assert target.read_text() == "somebody's"
    with pytest.raises(MigrationError, match=r"cannot be made on B: .*nowhere"):
        making.make(tmp_path / "nowhere/vars.fd")
    assert making.made == ("/b.raw",)


def test_what_was_made_is_known_to_be_ours(tmp_path: Path, shell: str) -> None:
    making, target = Making(), tmp_path / "vars.fd"
    making.make(target)
    assert making.made == ("/b.raw", str(target))
    assert (target.stat().st_size, target.stat().st_mode & 0o777) == (65536, 0o640)
