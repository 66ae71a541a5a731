"""What the monitor of the channel's end at the destination can do: tell of it, and say that all is done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from nbdserve.channel.destination import Destination, Event
from nbdserve.connection.listeners import Listener
from nbdserve.qmp.dispatch import Handler
from nbdserve.qmp.endpoint import Monitor


class ChannelControl:
    """The commands, of which ``quit`` and ``channel-done`` are QEMU's way to name things."""

    def __init__(self, destination: Destination, stop: Callable[[], None]) -> None:
        self._destination = destination
        self._stop = stop
        self.commands: dict[str, Handler] = {
            "query-channel": self._query_channel,
            "channel-done": self._channel_done,
            "quit": self._quit,
        }

    def _query_channel(self) -> object:
        return dataclasses.asdict(self._destination.status())

    def _channel_done(self) -> None:
        """Nothing of the source is needed any more: it is told so, and when it takes leave both ends end."""
        self._destination.say_done()

    def _quit(self) -> None:
        self._stop()


class ChannelMonitor:
    """The monitor, which tells its clients of the channel's events, too."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._monitor: Monitor | None = None

    @contextlib.contextmanager
    def served(self, destination: Destination, stop: Callable[[], None]) -> Iterator[None]:
        """Serve the monitor until the block ends; ``stop`` is called by ``quit``."""
        self._monitor = Monitor(
            self._listener, "nbdserve channel", ChannelControl(destination, stop).commands
        )
        self._monitor.start()
        try:
            yield
        finally:
            self._monitor.close()

    def tell(self, event: Event, reason: str) -> None:
        """Tell clients of an event of the channel, as CHANNEL_LOST. From any thread."""
        if self._monitor is not None:
            name = f"CHANNEL_{event.value.upper().replace('-', '_')}"
            self._monitor.emit(name, {"reason": reason} if reason else {})
