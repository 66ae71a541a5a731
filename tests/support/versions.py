"""The versions of the programs that tests run against, where what they do depends on it."""

from __future__ import annotations

import functools
import re

from tests.support.processes import check


def qemu() -> tuple[int, ...]:
    """QEMU's, as (7, 2) on Debian 12 and (10, 0) on Debian 13."""
    return _version("qemu-img")


def nbdkit() -> tuple[int, ...]:
    """nbdkit's, as (1, 32) on Debian 12 and (1, 42) on Debian 13."""
    return _version("nbdkit")


def libnbd() -> tuple[int, ...]:
    """libnbd's, and that of its tools, as (1, 14) on Debian 12 and (1, 22) on Debian 13."""
    return _version("nbdinfo")


def nbd_client() -> tuple[int, ...]:
    """That of nbd-client, as (3, 24) on Debian 12 and (3, 26) on Debian 13."""
    return _version("nbd-client", "-V")


@functools.cache
def _version(program: str, option: str = "--version") -> tuple[int, ...]:
    """The first two numbers of what the program says of itself."""
    found = re.search(r"(\d+)\.(\d+)", check(program, option))
    assert found
    return int(found[1]), int(found[2])
