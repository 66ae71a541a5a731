"""QEMU's stream and return path, as QEMU gives them to what it executes."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field

_LITTLE = 64 << 10
"""Bytes that are read ahead at a time."""
_MOST = 16 << 20
"""Bytes that are read ahead in all."""


@dataclass
class RamPipes:
    """The two pipes; ``over`` is told, once or more, whether all was loaded, or why not. For one thread."""

    reader: int
    writer: int
    over: Callable[[bool, str], None]
    ahead: bytearray = field(default_factory=bytearray)
    """What was read of the stream before there was a connection on which it could go."""

    def look_whether_broken_off(self) -> bool:
        """Tell whether QEMU has closed its stream. To be called now and then before there is a connection.

        A QEMU that is told to break off does so when it has written what it is just writing: so each time
        a little is read of what it has written.
        """
        poll = select.poll()
        poll.register(self.reader, select.POLLIN | select.POLLRDHUP)
        events = dict(poll.poll(0)).get(self.reader, 0)
        if events & (select.POLLHUP | select.POLLRDHUP | select.POLLERR):
            return True
        if events and len(self.ahead) < _MOST:
            self.ahead += os.read(self.reader, _LITTLE)
        return False
