"""The channel in this process: whoever migrates connects here, and the backing ``migrate:NAME`` is behind it.

Reconnecting, patience and whether it is the same disk are the backing's business, as with any server
(overlay/backing/): the channel only hands out connections, and says when there may be one again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from nbdserve.channel import places
from nbdserve.channel.destination import Destination, Event, Settings, Status
from nbdserve.client import Through
from nbdserve.common.threads import LOOK, promised
from nbdserve.connection.listeners import listen_unix
from nbdserve.service.entrance import Entrance
from overlay.channel.address import MigrateUri
from overlay.channel.options import ChannelOptions

_LOG = logging.getLogger("nbd-overlay")
_SETTLE = 2.0
"""Seconds in which streams that have been closed are counted no more."""
_LEAVE = 5.0
"""Seconds that a connected source has to take leave when this process ends."""


class Channel:
    """The destination's end. Everything may be called from any thread.

    ``source_came``, ``ram_came``, ``guest_came`` and ``emit`` are called in a thread of the channel: they
    return at once.
    ``_lock`` is held for moments only.

    Raises UsageError where the options make no sense, ConnectError when nobody can listen there.
    """

    def __init__(self, options: ChannelOptions, *, arrived: bool) -> None:
        self.source_came: Callable[[], None] = lambda: None
        """The source can be asked from now on."""
        self.guest_came: Callable[[], None] = lambda: None
        """All RAM is here."""
        self.ram_came: Callable[[], None] = lambda: None
        """RAM begins to come, and is kept waiting until ``let_ram_in``."""
        self.emit: Callable[[str, Mapping[str, object]], None] = lambda event, data: None
        """Tells a monitor's clients of an event, by its name and its data."""
        self._is_shared = options.socket is not None
        self._arrived = arrived
        self._lock = threading.Lock()
        self._done_wanted = self._closed = False
        self._over = threading.Event()
        tls = None if options.certificates is None else places.server_context(options.certificates)
        token = places.read_token(options.token_file)
        settings = Settings(
            token, options.incoming, tls, arrived=arrived, lasting=True, keeps_ram_waiting=True
        )
        self._entrance: Entrance | None = None
        with ExitStack() as undo:
            self.listeners = places.listen(options.listen, encrypted=tls is not None)
            for listener in self.listeners:
                undo.callback(listener.close)
            self._destination = Destination(self.listeners, settings, self._told)
            if options.socket is not None:
                entrance = listen_unix(options.socket, options.socket_owner)
                self._entrance = Entrance(entrance, self._destination.adopt)
            undo.pop_all()

    def start(self) -> None:
        """Accept the source from now on. OSError when there are no threads."""
        self._destination.start()
        if self._entrance is not None:
            self._entrance.start()
        for listener in self.listeners:
            _LOG.info("channel: the source may connect to %s", listener)

    def through(self, address: MigrateUri) -> Through:
        """Return the export of the source that has this name."""
        return Through(str(address), address.export, self._destination.open)

    @property
    def is_awaited(self) -> bool:
        """Tell whether it is certain that the source is here, or comes back: who asks for its disk waits."""
        status = self._destination.status()
        return self._arrived or status.connected or status.ram == "loaded"

    def guest_is_here(self) -> None:
        """From now on the guest here depends on the source, which is waited for."""
        self._arrived = True

    def let_ram_in(self) -> None:
        """Let this host's QEMU have the RAM: the guest's disk can be reached."""
        self._destination.let_ram_in()

    def turn_away(self, why: str) -> None:
        """End the connection, before the guest is here, which then goes on at the source."""
        self._destination.hang_up(why)

    def complete(self) -> None:
        """The disk of this process is complete. Where no other one can need the source, it is told so."""
        if self._is_shared:
            _LOG.info("channel: the source is kept for other disks, until nbd-overlay channel-done")
        else:
            promised("channel-done", partial(self._say_done, threading.TIMEOUT_MAX))

    def finish(self, timeout: float) -> None:
        """Tell the source that no disk needs it any more, and wait until it has taken leave.

        TimeoutError when it has not in time.
        """
        self._say_done(timeout)

    def others(self) -> int:
        """Return how many streams of others there are, who use the source's disks still.

        For who has closed its own: what has just been closed is waited for.
        """
        deadline = time.monotonic() + _SETTLE
        while (streams := self._destination.status().streams) and time.monotonic() < deadline:
            time.sleep(LOOK)
        return streams

    def status(self) -> Status:
        """Tell how it is doing."""
        return self._destination.status()

    def told(self) -> dict[str, object]:
        """Return what a monitor tells of it; sizes in bytes."""
        return {**dataclasses.asdict(self.status()), "done": self._over.is_set()}

    def close(self) -> None:
        """End. A source that was told to is given a moment to take leave; any other one goes on trying."""
        if self._done_wanted and self._destination.status().connected:
            self._over.wait(_LEAVE)
        self._close()

    def _say_done(self, timeout: float) -> None:
        with self._lock:
            is_first, self._done_wanted = not self._done_wanted, True
        if is_first:
            _LOG.info("channel: everything is here: the source is needed no more")
        if not self._over.is_set():
            self._destination.done(timeout)
        self._close()

    def _close(self) -> None:
        with self._lock:
            was_closed, self._closed = self._closed, True
        if was_closed:
            return
        if self._entrance is not None:
            self._entrance.close()
        self._destination.close()

    def _told(self, event: Event, reason: str) -> None:
        if event is Event.DONE:
            self._over.set()
            _LOG.info("channel: the source has taken leave")
        name = f"CHANNEL_{event.value.upper().replace('-', '_')}"
        self.emit(name, {"reason": reason} if reason else {})
        if event in (Event.BEGUN, Event.BACK):
            self.source_came()
        elif event is Event.RAM_BEGUN:
            self.ram_came()
        elif event is Event.RAM_LOADED:
            self.guest_came()
