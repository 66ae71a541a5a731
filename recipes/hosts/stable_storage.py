"""Files on stable storage: how long that takes is the disk's business, as long as it takes anything."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress

from nbdserve.common.clock import now
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import listed, on_one_line

LOOK = 5.0
"""Seconds between two looks whether the disk takes anything."""

ANSWER = 15.0
"""Seconds in which a host says that."""

_WRITTEN = on_one_line("""
for f; do
if test -b "$f"; then set -- $(stat -L -c "0x%t 0x%T" -- "$f"); a=$(($1)) b=$(($2));
else d=$(stat -L -c %d -- "$f"); a=$((d >> 8 & 0xfff)) b=$((d & 0xff | d >> 12 & 0xfff00)); fi;
if read -r _ _ _ _ _ _ n _ 2>/dev/null < "/sys/dev/block/$a:$b/stat"; then echo "$n";
else grep nr_written /proc/vmstat; fi;
done
""")
"""Says for each file how much its disk has written, or where that is not known all disks of the host."""


class Written:
    """How much the disks of some files on a host write, or take from a network."""

    def __init__(self, host: Host, paths: Sequence[str]) -> None:
        self._host = host
        self._paths = paths
        self._seen = ""

    async def has_moved(self) -> bool:
        """Tell whether anything was written since the last question; the first answer is yes.

        A host that does not answer has nothing to tell.
        """
        with suppress(MigrationError):
            told = await self._host.run("sh", "-c", _WRITTEN, "sh", *self._paths, limit=ANSWER)
            before, self._seen = self._seen, told
            return told != before
        return False


async def sync(host: Host, paths: Sequence[str], silence: float) -> None:
    """Have what is in these files on stable storage.

    Raises MigrationError when their disks have written nothing for ``silence`` seconds, and as Host.run().
    """
    written, moved = Written(host, paths), now()
    syncing = asyncio.ensure_future(host.run("sync", "--", *paths, limit=math.inf))
    try:
        while not (await asyncio.wait([syncing], timeout=min(LOOK, silence)))[0]:
            if await written.has_moved():
                moved = now()
            elif now() - moved > silence:
                raise MigrationError(
                    f"writing {listed(paths)} to stable storage on {host.name} has come to a halt: its disk "
                    f"has written nothing for {silence:g} s"
                )
        syncing.result()
    finally:
        syncing.cancel()
        await asyncio.gather(syncing, return_exceptions=True)
