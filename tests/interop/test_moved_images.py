"""What becomes of whoever opens an image whose guest has moved: our commands, and QEMU's."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import Process, check, run
from tests.support.recipes import COMMANDS, Operator
from tests.support.servers import nbdserve

NBD_MIGRATE = COMMANDS / "nbd-migrate"
TO = "b.example:/srv/vm.raw"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image that was put out of reach."""
    path = tmp_path / "vm.raw"
    random_disk(path, MIB)
    check(NBD_MIGRATE, "put-away", "vm", "needed", path, TO)
    return path


def refused(*command: str | Path) -> str:
    """The one line with which a command refuses."""
    done = run(*command, seconds=30)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    return done.stderr


def test_qemu_finds_nothing_under_the_old_name(image: Path) -> None:
    write = ["qemu-io", "-f", "raw", "-c", "write 0 512"]
    for words in (write, ["qemu-img", "info"], ["qemu-nbd", "-f", "raw"]):
        done = run(*words, image, seconds=30)
        assert done.returncode != 0
        assert "No such file or directory" in done.stderr


def test_our_commands_do_not_write_to_it_by_either_name(image: Path) -> None:
    for path in (image, Path(f"{image}.moved")):
        line = refused(COMMANDS / "nbdserve", "-f", "raw", "-k", image.parent / "socket", path)
        assert f"{path}: its guest went to {TO} on " in line
        assert "its disk there still needs this image, as it is" in line
    line = refused(
        COMMANDS / "nbd-overlay", "create", "--backing", "nbd://127.0.0.1:1/vm", "--size", "1M", image
    )
    assert f"{image}: its guest went to {TO} on " in line
    assert f"see {image}.moved.json" in Operator({"DISK": str(image), "NBD_ADDRESS": "127.0.0.1"}).fails(1)
    assert not image.exists()


def test_it_is_read_where_it_is_now(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", "-r", f"{image}.moved", directory=tmp_path) as server:
        check("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", server.uri())
    line = refused(COMMANDS / "nbdserve", "-r", "-f", "raw", "-k", image.parent / "socket", image)
    assert f"is {image}.moved now" in line


def test_what_a_refusal_says_is_typed_makes_it_an_image_like_others(image: Path) -> None:
    line = refused(COMMANDS / "nbdserve", "-f", "raw", "-k", image.parent / "socket", image)
    lifting = line.rstrip("\n").rpartition("without what was written since: ")[2]
    line = refused(NBD_MIGRATE, *shlex.split(lifting)[1:])
    assert "what it has written since is lost for this image" in line
    sure = line.rstrip("\n").rpartition("to lift the fence: ")[2]
    check(NBD_MIGRATE, *shlex.split(sure)[1:])
    check("qemu-io", "-f", "raw", "-c", "write 0 512", image)
    assert list(image.parent.glob("*.moved*")) == []


def test_it_is_not_given_back_while_the_fence_or_a_server_has_it(image: Path, tmp_path: Path) -> None:
    lifting = (NBD_MIGRATE, "fence", "--lift", image, "--yes")
    words = [str(NBD_MIGRATE), "fence", str(tmp_path / "ready"), str(image)]
    with Process(words, tmp_path / "fence.log") as fence:
        fence.wait_for((tmp_path / "ready").exists, "the fence")
        assert "the image is in use" in refused(*lifting)
    with nbdserve("-f", "raw", "-r", f"{image}.moved", directory=tmp_path):
        assert "the image is in use" in refused(*lifting)
    assert not image.exists()
    check(*lifting)
    assert image.exists()


def test_a_fence_with_a_departure_puts_its_images_out_of_reach_before_it_is_ready(tmp_path: Path) -> None:
    image, ready = tmp_path / "vm.raw", tmp_path / "ready"
    random_disk(image, MIB)
    words = [str(NBD_MIGRATE), "fence", str(ready), str(image), "--away", "vm", "--to", TO]
    with Process(words, tmp_path / "fence.log") as fence:
        fence.wait_for(ready.exists, "the fence")
        assert not image.exists()
        done = run("qemu-io", "-f", "raw", "-c", "write 0 512", f"{image}.moved", seconds=30)
        assert 'Failed to get "write" lock' in done.stderr
    # As when the host was switched off; and again, when it is there.
    with Process(words, tmp_path / "fence.log") as fence:
        fence.wait_for(ready.exists, "the fence")
        assert not image.exists()


def test_what_is_lifted_has_a_name_or_a_path(tmp_path: Path) -> None:
    assert "there is no migration vm" in refused(NBD_MIGRATE, "fence", "--lift", "vm")
    assert "there is no marker to be lifted" in refused(NBD_MIGRATE, "fence", "--lift", tmp_path / "no.raw")
