"""Going to the background where the system has no process left."""

from __future__ import annotations

import errno
import os
from typing import NoReturn

import pytest

from nbdserve.common.errors import OperatorError
from nbdserve.service.daemonize import background


def test_a_full_process_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("os.fork", refuse)
    told = "no process for the background can be started: look at ulimit"
    with pytest.raises(OperatorError, match=told), background([]):
        pass
