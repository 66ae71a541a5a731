"""What is on B is on stable storage before the run says that nothing on A is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.runtime import Migration
from recipes.plans.flash import PlannedFlash
from recipes.plans.limits import Limits
from recipes.steps.shut_down import clear_source


@pytest.mark.parametrize(("code", "told"), [(0, 0), (1, 1)])
def test_flash_chips_are_synced_and_a_failure_of_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: int
) -> None:
    (tmp_path / "sync").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/synced\nexit {code}\n')
    (tmp_path / "sync").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    notes: list[str] = []
    flash = tuple(PlannedFlash(f"/a/{name}.fd", f"/b/{name}.fd") for name in ("vars", "more"))
    m = SimpleNamespace(
        plan=SimpleNamespace(flash=flash, limits=Limits()),
        host_b=Host("B"),
        report=SimpleNamespace(note=notes.append),
        disks=(SimpleNamespace(image="/a.raw"),),
        a=SimpleNamespace(connected=True),
        state=SimpleNamespace(exporter=""),
        server=None,
        fence=None,
    )
    # It is the first thing to be done, before anything of A is given up.
    with pytest.raises(MigrationError, match="A's QEMU does not end"):
        clock.run(clear_source(cast(Migration, m)))
    assert (tmp_path / "synced").read_text() == "-- /b/vars.fd /b/more.fd\n"
    assert len(notes) == told
