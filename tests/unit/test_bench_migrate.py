"""What the benchmark of a migration makes of what the guest tells."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from recipes.errors import MigrationError
from tests.bench.migrate.bounds import verdicts
from tests.bench.migrate.guest import Done, Guest, GuestError, Listener
from tests.bench.migrate.hosts import LINKS, Hosts, Link
from tests.bench.migrate.link import QUEUE, Direction
from tests.bench.migrate.run import last_words, nothing_left
from tests.bench.migrate.sample import Latency, Phase, Sample, latency, sample
from tests.bench.migrate.setting import Moved, MoveError, Setting
from tests.support.guests import short_directory
from tests.support.processes import wait_until

GUEST = [
    Done(1.0, "a", "w", 0.001),
    Done(2.0, "a", "r", 0.002),
    Done(4.0, "a", "w", 0.003),
    Done(4.5, "b", "w", 0.4),
    Done(6.0, "b", "r", 0.005),
    Done(8.0, "b", "r", 0.006),
]


def told(*lines: str) -> Listener:
    """What was heard of these lines, all on A."""
    heard = Listener()
    for number, line in enumerate(lines):
        heard.hear("a", line, float(number))
    return heard


def samples(
    window: float, downtime: float = 0.1, passed: int = 100, longest: float = 0.2
) -> Sequence[Sample]:
    """One migration with these figures."""
    latencies = {(Phase.DURING, "w"): Latency(0.001, 0.01, longest)}
    return [Sample(1.0, downtime, 0.15, window, 9.0, passed, latencies, misjudged=0.3)]


def test_moments_of_a_migration_are_those_at_which_the_guest_was_answered() -> None:
    found = sample(Moved(began=1.5, free=7.0, ended=9.5, downtime_ms=100, layout="raw"), GUEST, 1000)
    assert (found.cut_over, found.gap, found.window, found.total) == (3.0, 0.5, 2.5, 8.0)
    assert found.latencies[Phase.BEFORE, "w"].longest == 0.001
    assert found.latencies[Phase.DURING, "w"].longest == 0.4
    assert found.latencies[Phase.AFTER, "r"].longest == 0.006
    assert found.longest == 0.5, "it stood still for longer than any request took"


def test_a_mirror_leaves_no_window() -> None:
    found = sample(Moved(1.5, free=7.0, ended=9.5, downtime_ms=100, layout="raw", window=False), GUEST, 1000)
    assert found.window == 0.0
    assert found.latencies[Phase.AFTER, "r"].longest == 0.006


def test_a_guest_that_has_said_nothing_on_a_host_is_a_failed_migration() -> None:
    moved = Moved(began=1.5, free=7.0, ended=9.5, downtime_ms=100, layout="raw")
    with pytest.raises(MoveError, match="no request on b"):
        sample(moved, [each for each in GUEST if each.host == "a"], 1000)


def test_of_no_request_nothing_is_said() -> None:
    assert latency([]) == Latency(0.0, 0.0, 0.0)


def test_a_request_that_was_not_told_of_is_noticed() -> None:
    assert [each.seconds for each in told("w 1 2000", "r 1 3000", "w 2 5").done] == [0.002, 0.003, 0.000005]
    with pytest.raises(GuestError, match="after w 1 the guest told of 3"):
        _ = told("w 1 2000", "w 3 5").done


@pytest.mark.parametrize("line", ["! w: Input/output error", "x 1 2", "w one 2", ""])
def test_a_guest_that_fails_ends_the_measurement(line: str) -> None:
    with pytest.raises(GuestError, match="the guest on a says"):
        _ = told("w 1 2000", line).done


@pytest.mark.parametrize(
    ("link", "filesystem", "most"),
    [
        (LINKS[0], "tmpfs", 2 / 3),
        (LINKS[0], "ext2/ext3", 1.0),
        (LINKS[1], "tmpfs", 1.0),
        (LINKS[2], "tmpfs", 0.05),
    ],
)
def test_the_window_of_postcopy_has_a_bound_on_every_link(link: Link, filesystem: str, most: float) -> None:
    measured = {"stock": samples(10.0), "postcopy": samples(0.6), "hybrid": []}
    window, *_ = verdicts(link, filesystem, 100, measured)
    assert (window.most, window.measured, window.kept) == (most, 0.06, most > 0.06)


def test_bounds_that_are_missed_are_told() -> None:
    measured = {"stock": samples(10.0), "hybrid": samples(2.0, downtime=0.2, passed=140, longest=1.5)}
    found = list(verdicts(LINKS[1], "tmpfs", 100, measured))
    assert [round(each.measured, 3) for each in found] == [0.2, 2.0, 0.3, 1.4, 1.5]
    assert not any(each.kept for each in found)


def test_all_connections_share_the_rate_of_a_direction() -> None:
    way = Direction(rate=1000.0, delay=5.0)
    began = time.monotonic()
    for _ in range(3):
        leaves, arrives = way.send(1000)
    assert leaves >= began + 3.0 - QUEUE
    assert arrives == pytest.approx(leaves + 5.0)
    assert way.passed == 3000


def test_what_the_guest_says_may_begin_on_one_host_and_end_on_the_other() -> None:
    with short_directory() as sockets:
        guest = Guest(Path("kernel"), Path("initramfs"), 50.0, sockets)
        with guest.heard() as heard:
            for host, told in (("a", b"w 1 1000\nw 2 "), ("b", b"2000\nr 1 5\n")):
                with socket.socket(socket.AF_UNIX) as qemu:
                    qemu.connect(str(guest.port(host)))
                    qemu.sendall(told)
            wait_until(lambda: len(heard.done) == 3, "all is heard")
        assert [(each.host, each.kind) for each in heard.done] == [("a", "w"), ("b", "w"), ("b", "r")]


@pytest.mark.parametrize(
    ("console", "told"),
    [
        ("", "silent"),
        ("MemoryError\n\n", "MemoryError"),
        (
            "[1.0] Kernel panic - not syncing: Attempted to kill init!\n[1.1] Call Trace:\n",
            "[1.0] Kernel panic - not syncing: Attempted to kill init!",
        ),
    ],
)
def test_a_guest_that_has_ended_is_told_of_with_why_its_kernel_says(console: str, told: str) -> None:
    assert last_words(console) == told


def test_a_migration_that_fails_is_told_with_the_consoles_before_they_are_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(sockets: Path, disks: Path) -> None:
        guest = Guest(Path("kernel"), Path("initramfs"), 50.0, sockets)
        setting = Setting(Hosts("", None, disks), guest, disks, disks / "a.raw", 0, Listener(), ExitStack())
        with nothing_left(setting):
            (sockets / "a.console").write_text("BUG: first\nKernel panic - not syncing: why\n")
            raise MigrationError("first line\nA's QEMU has ended")

    with short_directory() as sockets, short_directory() as disks, pytest.raises(MoveError) as raised:
        fail(sockets, disks)
    assert str(raised.value) == "A's QEMU has ended; its console on a: Kernel panic - not syncing: why"
    assert "a.console: BUG: first" in capsys.readouterr().err
