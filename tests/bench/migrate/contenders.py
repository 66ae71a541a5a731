"""Who moves the guest: a line for each, and the bounds that were set for ours beside the stock six steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.migrate import mirror, stock
from tests.bench.migrate.ours import knows, moves
from tests.bench.migrate.setting import Moved, Setting


@dataclass(frozen=True)
class Contender:
    """A way to move a guest with its disk.

    remark  what it is
    policy  that nbd-migrate must know for it; empty: QEMU's own means
    """

    name: str
    remark: str
    move: Callable[[Setting], Moved]
    policy: str = ""

    @property
    def is_there(self) -> bool:
        """Tell whether this version can do it."""
        return not self.policy or knows(self.policy)


STOCK = Contender(
    "stock",
    "the six steps with QEMU alone: `qemu-nbd`, a QED overlay with copy-on-read, `block-stream`",
    stock.move,
)
MIRROR = Contender(
    "mirror",
    "QEMU's `blockdev-mirror` (`sync=full`) to B's NBD server, then the RAM: libvirt's copy-storage",
    mirror.moves("background"),
)
MIRROR_SYNC = Contender(
    "mirror, sync",
    "the same with `copy-mode=write-blocking`: libvirt's synchronous writes",
    mirror.moves("write-blocking"),
)
POSTCOPY = Contender(
    "postcopy",
    "`nbd-migrate run --policy postcopy --channel plain`",
    moves("postcopy", "plain"),
    "postcopy",
)
POSTCOPY_TLS = Contender(
    "postcopy, TLS",
    "`nbd-migrate run --policy postcopy`, disk and RAM over TLS, which is the default",
    moves("postcopy", "tls"),
    "postcopy",
)
SINGLE = Contender(
    "single",
    "`nbd-migrate run --policy postcopy --channel single`: disk and RAM in one connection, over TLS too",
    moves("postcopy", "single"),
    "postcopy",
)
HYBRID = Contender(
    "hybrid",
    "`nbd-migrate run --policy hybrid --channel plain --no-verify`, as the others compare nothing",
    moves("hybrid", "plain", "--no-verify"),
    "hybrid",
)
CONTENDERS = (STOCK, MIRROR, MIRROR_SYNC, POSTCOPY, POSTCOPY_TLS, SINGLE, HYBRID)
