"""What the monitor can do about the channel: tell of it, and say that no disk needs the source any more."""

from __future__ import annotations

from concurrent.futures import Future

from nbdserve.common.errors import reason_of
from nbdserve.common.threads import promised
from nbdserve.qmp.dispatch import CommandError, Handler
from overlay.channel.end import Channel
from overlay.daemon import Daemon

_LONGEST = 3600
"""Seconds for which the source's answer is waited for, at most."""


class ChannelControl:
    """The commands, where there is a channel."""

    def __init__(self, daemon: Daemon, channel: Channel) -> None:
        self._daemon = daemon
        self._channel = channel
        self.commands: dict[str, Handler] = {
            "query-channel": channel.told,
            "channel-done": self._channel_done,
        }

    def _channel_done(self, timeout: int = 10) -> Future[None]:
        """All disks are complete: the source is told so, and ends by itself."""
        if not 0 <= timeout <= _LONGEST:
            raise CommandError(f"Invalid parameter '{timeout}': a timeout is 0 to {_LONGEST} seconds")
        if not self._daemon.finished:
            raise CommandError("not all of this disk is here: the source is needed still")
        return promised("channel-done", lambda: self._say_done(timeout))

    def _say_done(self, timeout: int) -> None:
        others = self._channel.others()
        if others:
            raise CommandError(
                f"others use the source's disks still (connections: {others}): complete their disks first"
            )
        try:
            self._channel.finish(timeout)
        except OSError as error:
            raise CommandError(f"{reason_of(error)}; it is told when it connects again") from error
