"""The processes that a migration starts, and whose life they share.

Each child has a keeper (recipes/keeper.py) that ends it when this process ends, even by SIGKILL, until it is
released: then it lives on by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType


class Child:
    """A process that was started through a keeper.

    name  what messages call it
    pid   its process id, on the host where it runs
    """

    name: str
    pid: int

    async def wait(self) -> int:
        """Wait until the process has ended; return its exit status, negative for a signal."""
        raise NotImplementedError

    async def stop(self, seconds: float) -> None:
        """End the process: SIGTERM, and SIGKILL when ``seconds`` have passed."""
        raise NotImplementedError


class Children:
    """Every process that was started, in order.

    async with Children() as children:      # whatever is started ends with this block, or with this process
        ...
    """

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop every child that was not released, the youngest first."""

    async def start(self, name: str, argv: Sequence[str], *, log: Path, shell: Sequence[str] = ()) -> Child:
        """Start a process; raises MigrationError when it cannot be started."""
        raise NotImplementedError
