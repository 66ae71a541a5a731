"""The demo's directories, which are removed however the demo ends."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import place_for_sockets

REMOVAL_LIMIT = 60.0  # seconds


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Provide a directory that is removed after the block, also if this process is killed in it."""
    path = tempfile.mkdtemp(prefix="nbd-migrate-demo-", dir=place_for_sockets())
    # Its standard input ends when the block does, or when we do. In a session of its own Ctrl-C spares it.
    argv = ["sh", "-c", 'cat >/dev/null; rm -rf -- "$1"', "sh", path]
    janitor = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd="/", start_new_session=True)
    assert janitor.stdin is not None
    try:
        yield Path(path)
    finally:
        janitor.stdin.close()
        janitor.wait(REMOVAL_LIMIT)


@contextmanager
def kept_directory(path: Path) -> Iterator[Path]:
    """Provide a directory that the operator wants to look at afterwards.

    It must be empty or not exist yet.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--keep {path}: name an empty directory, or one that does not exist")
    path.mkdir(parents=True, exist_ok=True)
    yield path
