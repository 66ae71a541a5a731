"""Sockets and images for somebody else: who can use them, and who cannot."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.disks import random_disk
from tests.support.guests import short_directory
from tests.support.overlays import NBD_OVERLAY
from tests.support.processes import Argument, is_alive, run, wait_until
from tests.support.servers import NBDSERVE, Server, UnixAddress, nbdserve

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
QEMU, OTHER = 65534, 65533
"""The user for whom something is made, and another one."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter."""
    with short_directory() as path:
        path.chmod(0o755)
        random_disk(path / "disk.raw", 1 << 20)
        yield path


def as_user(number: int, *argv: Argument) -> CompletedProcess[str]:
    """Run a command as this user, in the group of the same number."""
    return run("setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", *argv)


def reaches(number: int, uri: str) -> bool:
    """Whether this user can be a client there."""
    return as_user(number, "nbdinfo", "--size", uri).returncode == 0


def test_a_socket_is_for_its_owner_and_its_group(place: Path) -> None:
    for options, users in (
        ((), {0}),
        (("--socket-owner", f"{QEMU}"), {0, QEMU}),
        (("--socket-mode", "0666"), {0, QEMU, OTHER}),
        (("--socket-mode", "0660", "--socket-owner", f":{OTHER}"), {0, OTHER}),
        (("--socket-mode", "660", "--socket-owner", f"{QEMU}:{OTHER}"), {0, QEMU, OTHER}),
    ):
        with nbdserve("-r", "-f", "raw", *options, place / "disk.raw", directory=place) as server:
            assert {user for user in (0, QEMU, OTHER) if reaches(user, server.uri())} == users, options


def test_the_monitor_is_not_given_away_with_the_socket(place: Path) -> None:
    monitor = place / "qmp"
    given = ("-r", "-f", "raw", f"--qmp=unix:{monitor}", f"--socket-owner={QEMU}", "--socket-mode=0666")
    with nbdserve(*given, place / "disk.raw", directory=place):
        assert whose(monitor) == (0, 0, 0o600)
    with nbdserve(*given, "--qmp-owner", f"{OTHER}", "--qmp-mode=0620", place / "disk.raw", directory=place):
        assert whose(monitor) == (OTHER, 0, 0o620)


def test_every_unix_socket_of_a_server_is_given_away_but_no_port(place: Path) -> None:
    listen = [f"--listen=nbd+unix://?socket={place}/{name}" for name in "ab"]
    given = ("-r", "-f", "raw", *listen, "--listen=nbd://127.0.0.1:0", f"--socket-owner={QEMU}")
    argv: list[Argument] = [NBDSERVE, *given, "--fork", "--pid-file", place / "pid", place / "disk.raw"]
    assert run(*argv).returncode == 0
    try:
        assert [whose(place / name)[0] for name in "ab"] == [QEMU, QEMU]
    finally:
        os.kill(int((place / "pid").read_text()), signal.SIGTERM)


def test_a_socket_is_made_before_the_server_becomes_another(place: Path) -> None:
    given = ("-r", "-f", "raw", "--user=daemon", f"--socket-owner={QEMU}")
    with nbdserve(*given, place / "disk.raw", directory=place) as server:
        assert reaches(QEMU, server.uri())
        assert not reaches(OTHER, server.uri())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--socket-mode", "0660"), "--socket-mode and --socket-owner are for a Unix socket with a path"),
        (
            ("--listen=nbd+unix://?socket=%00n", "--socket-owner=0"),
            "are for a Unix socket with a path: give it with -k",
        ),
        (("-k", "s", "--socket-mode", "9"), "--socket-mode 9: write an octal mode up to 0777, such as 0660"),
        (("-k", "s", "--socket-owner", "no-such"), "there is no user no-such"),
        (("-k", "s", "--qmp-owner", "root"), "--qmp-mode and --qmp-owner are for the monitor: add --qmp"),
    ],
)
def test_what_makes_no_sense_is_one_line(place: Path, options: tuple[str, ...], complaint: str) -> None:
    done = run(NBDSERVE, *options, place / "disk.raw", cwd=place)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_cannot_give_a_socket_away_says_so_and_leaves_none(place: Path) -> None:
    (place / "mine").mkdir()
    os.chown(place / "mine", QEMU, QEMU)
    socket = place / "mine" / "s"
    done = as_user(QEMU, NBDSERVE, "-r", "-f", "raw", "-k", socket, "--socket-owner=0", place / "disk.raw")
    if "Permission denied" in done.stderr or "No such file" in done.stderr:
        pytest.skip("nobody else may run what is installed here")
    assert done.returncode == 1
    why = "cannot be given to 0: Operation not permitted; only root can give files away"
    assert done.stderr == f"nbdserve: unix:{socket}: {why}\n"
    assert list((place / "mine").iterdir()) == []


@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_an_image_is_made_for_its_owner(place: Path, layout: str, server: Server) -> None:
    image = place / "b.raw"
    argv: list[Argument] = [NBD_OVERLAY, "create", "--layout", layout, "--backing", server.uri()]
    assert run(*argv, "--owner", f"{QEMU}:{OTHER}", "--mode", "0640", image).returncode == 0
    assert whose(image) == (QEMU, OTHER, 0o640)
    assert run(*argv, "--owner", f"{OTHER}", "--force", image).returncode == 0
    assert whose(image) == (OTHER, OTHER, 0o640)
    fresh = place / "c.raw"
    assert run(*argv, "--owner", f"{OTHER}", fresh).returncode == 0
    assert whose(fresh) == (OTHER, 0, 0o600)
    done = run(*argv, "--owner", "no-such-user", place / "d.raw")
    assert done.stderr == "nbd-overlay: --owner no-such-user: there is no user no-such-user\n"
    assert done.returncode == 2
    assert not (place / "d.raw").exists()


def test_an_overlays_socket_is_given_away_each_time_it_is_started(place: Path, server: Server) -> None:
    assert run(NBD_OVERLAY, "create", "--backing", server.uri(), place / "b.raw").returncode == 0
    argv: list[Argument] = [
        NBD_OVERLAY,
        "serve",
        place / "b.raw",
        "-k",
        place / "s",
        "--qmp",
        f"unix:{place}/q",
    ]
    for _ in range(2):
        given = ("--socket-owner", f"{QEMU}", "--daemonize", "--pid-file", place / "pid")
        assert run(*argv, *given).returncode == 0
        assert whose(place / "s") == (QEMU, 0, 0o600)
        assert whose(place / "q") == (0, 0, 0o600)
        assert reaches(QEMU, UnixAddress(place / "s").uri())
        assert not reaches(OTHER, UnixAddress(place / "s").uri())
        # So that the next one finds the socket of a dead one.
        kill(int((place / "pid").read_text()))


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    """Where the disk is."""
    with nbdserve("-r", "-f", "raw", place / "disk.raw", directory=place) as made:
        yield made


def kill(pid: int) -> None:
    """Let a daemon die."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "it is dead")


def whose(path: Path) -> tuple[int, int, int]:
    """Owner, group and mode."""
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)
