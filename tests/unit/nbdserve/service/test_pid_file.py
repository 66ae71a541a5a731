"""Pid files: whole when they appear, one living process's each, and nothing else is ever overwritten."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.common import file_locks
from nbdserve.common.errors import OperatorError
from nbdserve.service.pid_file import PidFile

OURS = f"{os.getpid()}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the pid file is going to be."""
    return tmp_path / "server.pid"


def test_it_appears_whole_and_locked_with_publish_and_goes_with_its_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, seen = os.link, []

    def watched_link(source: Path, target: Path) -> None:
        link(source, target)
        with target.open() as file:
            seen.append((file.read(), file_locks.is_locked_by_another(file.fileno(), file_locks.READ)))

    monkeypatch.setattr(os, "link", watched_link)
    with PidFile(path) as pid_file:
        assert not path.exists()
        pid_file.publish()
        assert path.read_text() == OURS
        assert stat.S_IMODE(path.stat().st_mode) & 0o133 == 0
        assert os.listdir(path.parent) == [path.name]
    assert seen == [(OURS, True)]
    assert not os.listdir(path.parent)


def test_without_a_path_nothing_is_made(tmp_path: Path) -> None:
    with PidFile(None) as pid_file:
        pid_file.publish()
    assert not os.listdir(tmp_path)


def test_a_living_process_keeps_its_file_and_a_newcomer_is_told_whose_it_is(path: Path) -> None:
    refusal = f"process {os.getpid()} has this pid file: end it first, or choose another path"
    with PidFile(path) as first:
        with PidFile(path) as late:
            first.publish()
            with pytest.raises(OperatorError, match=refusal):
                late.publish()
        assert path.read_text() == OURS
        with pytest.raises(OperatorError, match=refusal), PidFile(path):
            pass
        assert path.read_text() == OURS
        assert os.listdir(path.parent) == [path.name]
    assert not path.exists()


@pytest.mark.parametrize("content", ["4000000\n", "1\n", "1", "  17 \n", "", pytest.param(OURS, id="ours")])
def test_the_file_of_a_process_that_has_ended_is_taken_over_whoever_has_its_number_now(
    path: Path, content: str
) -> None:
    path.write_text(content)
    with PidFile(path) as pid_file:
        assert path.read_text() == content
        pid_file.publish()
        assert path.read_text() == OURS
    assert not path.exists()


def test_of_many_that_come_at_once_one_gets_it(path: Path) -> None:
    for _ in range(20):
        path.write_text("4000000\n")
        barrier, files = threading.Barrier(8), [PidFile(path) for _ in range(8)]
        winners: list[PidFile] = []

        def come(
            pid_file: PidFile, barrier: threading.Barrier = barrier, won: list[PidFile] = winners
        ) -> None:
            barrier.wait()
            with suppress(OperatorError):
                pid_file.__enter__().publish()
                won.append(pid_file)

        threads = [threading.Thread(target=come, args=(pid_file,)) for pid_file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert path.read_text() == OURS
        for pid_file in files:
            pid_file.__exit__()
        assert not os.listdir(path.parent)


def to_a_file(path: Path) -> None:
    """A link to another file, as one who may write to the directory plants it."""
    path.with_name("victim").write_text("1\n")
    path.symlink_to("victim")


OTHERS: dict[str, Callable[[Path], object]] = {
    "a disk": lambda path: path.write_bytes(bytes(4096)),
    "a short text": lambda path: path.write_text("precious"),
    "many digits": lambda path: path.write_text("1" * 4096),
    "a link to a file": to_a_file,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_pid_file_is_left_alone(path: Path, kind: str) -> None:
    OTHERS[kind](path)

    def state() -> dict[str, object]:
        entries = {entry.name: entry.lstat() for entry in path.parent.iterdir()}
        return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in entries.items()}

    before = state()
    refusal = r"what is there is no pid file, and is left alone: choose another path"
    with pytest.raises(OperatorError, match=refusal), PidFile(path):
        pass
    late = PidFile(path)
    with pytest.raises(OperatorError, match=refusal):
        late.publish()
    assert state() == before


def test_at_the_end_somebody_elses_file_stays(path: Path) -> None:
    with PidFile(path) as pid_file:
        pid_file.publish()
        path.unlink()
        path.write_text("12345\n")
    assert path.read_text() == "12345\n"


def test_where_the_directory_is_out_of_reach_in_the_end_the_file_is_emptied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with PidFile(path) as pid_file:
        pid_file.publish()
        monkeypatch.setattr(Path, "unlink", forbidden)
    monkeypatch.undo()
    assert path.read_text() == ""
    with PidFile(path) as pid_file:
        pid_file.publish()
        assert path.read_text() == OURS


def test_a_file_system_without_hard_links_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "File exists")
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", impossible)
    path.write_text("4000000\n")
    with PidFile(path) as pid_file:
        pid_file.publish()
        assert path.read_text() == OURS
        with pytest.raises(OperatorError, match="has this pid file"), PidFile(path):
            pass
    assert not os.listdir(path.parent)


def test_without_locks_a_living_number_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_locks, "lock", impossible)
    path.write_text("4000000\n")
    with PidFile(path) as pid_file:
        pid_file.publish()
        with pytest.raises(OperatorError, match=f"process {os.getpid()} has"), PidFile(path):
            pass
        assert path.read_text() == OURS
    assert not path.exists()


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with (
        PidFile(tmp_path / "none" / "pid") as pid_file,
        pytest.raises(OperatorError, match="none/pid: cannot write the pid file: No such file or directory"),
    ):
        pid_file.publish()
