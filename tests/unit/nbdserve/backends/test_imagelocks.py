"""Image locks between open files of one process: the kernel keeps them per open file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.imagelocks import EXCLUSIVE, READER, WRITER, ImageLocks, Permission
from nbdserve.common.errors import ImageError


class Opener:
    """Opens one image file again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fds: list[int] = []

    def __call__(self, flags: int = os.O_RDWR) -> ImageLocks:
        self.fds.append(os.open(self.path, flags))
        return ImageLocks(self.fds[-1], str(self.path))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    path = tmp_path / "image"
    path.touch()
    opener = Opener(path)
    yield opener
    for fd in opener.fds:
        os.close(fd)


def test_a_second_writer_is_refused_until_the_first_releases(opened: Opener) -> None:
    first, second = opened(), opened()
    first.hold(WRITER, EXCLUSIVE)
    with pytest.raises(ImageError, match=r"image: the image is in use: another process keeps others from"):
        second.hold(WRITER, EXCLUSIVE)
    first.release()
    second.hold(WRITER, EXCLUSIVE)


def test_a_reader_is_refused_while_another_writes(opened: Opener) -> None:
    opened().hold(WRITER, EXCLUSIVE)
    with pytest.raises(ImageError, match="another process is writing to it"):
        opened(os.O_RDONLY).hold(READER, EXCLUSIVE)


def test_readers_share_and_keep_writers_out(opened: Opener) -> None:
    opened(os.O_RDONLY).hold(READER, EXCLUSIVE)
    opened(os.O_RDONLY).hold(READER, EXCLUSIVE)
    with pytest.raises(ImageError, match="keeps others from writing to it"):
        opened().hold(WRITER, EXCLUSIVE)


def test_a_reader_that_unshares_nothing_lives_beside_a_writer(opened: Opener) -> None:
    opened().hold(WRITER, EXCLUSIVE)
    opened(os.O_RDONLY).hold(READER, Permission.NONE)


def test_a_fence_keeps_writers_out_and_lets_readers_in(opened: Opener) -> None:
    opened(os.O_RDONLY).hold(Permission.NONE, EXCLUSIVE)
    opened(os.O_RDONLY).hold(READER, EXCLUSIVE)
    with pytest.raises(ImageError, match="keeps others from"):
        opened().hold(WRITER, EXCLUSIVE)


def test_a_refusal_leaves_no_lock_behind_and_keeps_those_held_before(opened: Opener) -> None:
    writer, upgraded, third = opened(), opened(), opened()
    upgraded.hold(READER, Permission.NONE)
    writer.hold(Permission.READ | Permission.WRITE, Permission.WRITE)
    with pytest.raises(ImageError):
        upgraded.hold(WRITER, EXCLUSIVE)
    third.hold(Permission.RESIZE, Permission.RESIZE)
    with pytest.raises(ImageError, match="is reading it"):
        third.hold(Permission.RESIZE, Permission.READ)
    upgraded.release()
    with pytest.raises(ImageError, match="is reading it"):
        third.hold(Permission.RESIZE, Permission.READ)
    writer.release()
    third.hold(Permission.RESIZE, Permission.READ)


def test_holding_less_lets_others_have_the_rest(opened: Opener) -> None:
    first, second = opened(), opened()
    first.hold(WRITER, EXCLUSIVE)
    first.hold(READER, Permission.NONE)
    second.hold(WRITER, EXCLUSIVE)


def test_closing_the_file_releases_its_locks(opened: Opener) -> None:
    opened().hold(WRITER, EXCLUSIVE)
    os.close(opened.fds.pop())
    opened().hold(WRITER, EXCLUSIVE)


def test_what_cannot_be_locked_is_said_in_one_line(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(ImageError, match="cannot lock") as caught:
            ImageLocks(fd, "x.img").hold(READER, EXCLUSIVE)
    finally:
        os.close(fd)
    assert "\n" not in str(caught.value)
