"""What ``nbd-overlay serve`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.ownership import PRIVATE, Ownership
from nbdserve.common.uri import NbdUri
from overlay.backing.defaults import CONNECTIONS, PATIENCE
from overlay.channel.address import Address
from overlay.channel.options import ChannelOptions
from overlay.formats.open import Layout

MIRROR_QUEUE = 64 << 20


@dataclass(frozen=True)
class Options:
    """What the command line of ``serve`` says."""

    image: Path
    socket: str
    name: str = ""
    """Of the export."""
    layout: Layout | None = None
    """None: as the file looks."""
    map_file: Path | None = None
    """Of an image on a block device, if it is not where the trailer says."""
    size: int | None = None
    """Of a complete disk on a block device that is larger; None: the device's."""
    monitor: str | None = None
    socket_owner: Ownership = PRIVATE
    monitor_owner: Ownership = PRIVATE
    backings: tuple[Address, ...] = ()
    """Instead of those that the image names."""
    keep: bool = True
    """Copy-on-read."""
    stream: bool = False
    seed: Path | None = None
    """A copy that this host has: what is equal there is not fetched for streaming."""
    verify: bool = False
    """Compare what was copied with the source, before that is needed no more."""
    speed: int = 0
    """Bytes a second at which to stream; 0 means no limit."""
    armed: bool = False
    pre_copy: bool = False
    """Keep what is copied while the guest still runs elsewhere, as somebody invalidates what it changes."""
    channel: ChannelOptions | None = None
    """Of a migration over one connection, of which this process is an end."""
    mirror: NbdUri | None = None
    """Where the guest's writes also go."""
    mirror_queue: int = MIRROR_QUEUE
    """Bytes of memory for those that are on their way there."""
    connections: int = CONNECTIONS
    patience: float = PATIENCE
    """Seconds for which guests wait for a lost backing."""
    metrics: tuple[str, int] | None = None
    structured_replies: bool = True
    daemonize: bool = False
    pid_file: Path | None = None
    verbose: bool = False
    json_log: bool = False
