"""The hosts of a migration, before there is a plan."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdserve.common import clock
from recipes.connections import installed
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans import reaching


def test_another_version_on_a_host_is_refused_before_it_is_asked_about_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it answers may mean something else."""
    other = tmp_path / "nbdserve"
    other.write_text("#!/bin/sh\necho nbdserve 9.9\n")
    other.chmod(0o755)

    async def find_commands(host: Host, key: str, limit: float) -> str:
        return str(tmp_path)

    @asynccontextmanager
    async def sharing(*hosts: Host) -> AsyncIterator[tuple[Host, ...]]:
        yield tuple(Host(host.name, address=host.address) for host in hosts)

    monkeypatch.setattr(installed, "find_commands", find_commands)
    monkeypatch.setattr(reaching, "sharing", sharing)

    async def body() -> None:
        async with reaching.looked_at("ssh://a.example", "", 60.0):
            pytest.fail("it was let pass")

    with pytest.raises(MigrationError, match=r"nbdserve on A is of version 9\.9, and this is "):
        clock.run(body())
