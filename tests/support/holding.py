"""Somebody else who has an image open: a real qemu-io, with QEMU's locks."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import dying_with_parent


@contextmanager
def qemu_holding(image: Path, *options: str) -> Iterator[None]:
    """A qemu-io that has the image open until the block ends; its answer shows that it has its locks."""
    argv = [*dying_with_parent(signal.SIGKILL), "qemu-io", "-f", "qed", *options, str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"length\n")
            process.stdin.flush()
            assert b"MiB" in process.stdout.readline()
            yield
        finally:
            process.kill()
