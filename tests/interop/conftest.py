"""Fixtures of the tests with stock tools."""

from __future__ import annotations

import pytest

from tests.support.tls import Identities


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    """Certificates of servers and clients, good and bad."""
    return Identities.create(tmp_path_factory.mktemp("pki"))
