"""Whether a server that comes back has the same disk, while the guest still changes it there and later."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.overlays import LAYOUTS, Daemon, Layout, end, make_overlay, overlay
from tests.support.processes import wait_until
from tests.support.servers import Server, UnixAddress, nbdkit, nbdserve

SIZE = 8 * MIB

both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def source(directory: Path) -> Iterator[Server]:
    """An nbdserve of the file ``disk``, where it can come back."""
    address = UnixAddress(directory / "source.sock")
    with nbdserve("--read-only", directory / "disk", directory=directory, at=address) as server:
        yield server


def uri(directory: Path) -> str:
    """Its URI, whether it is there or not."""
    return UnixAddress(directory / "source.sock").uri()


def change(directory: Path, offset: int, data: bytes) -> None:
    """The guest, which still runs at the source, writes."""
    with (directory / "disk").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def wait_for_refusal(daemon: Daemon) -> None:
    """The source must not be used any more, as its disk is another."""

    def is_refused() -> bool:
        (told,) = daemon.status()["sources"]
        return not told["connected"] and "another disk" in str(told["trouble"])

    wait_until(is_refused, "the source is refused", 10)


@both
@pytest.mark.parametrize(("read", "changed"), [(64 * KIB, 64 * KIB), (MIB, 896 * KIB)], ids=["few", "many"])
def test_a_disk_that_the_guest_has_changed_at_the_source_is_still_the_same(
    layout: Layout, read: int, changed: int, tmp_path: Path
) -> None:
    content, new = random_disk(tmp_path / "disk", SIZE), random_bytes(changed, seed=9)
    image = make_overlay(tmp_path / "overlay", layout, SIZE, uri(tmp_path))
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=5", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, read) == content[:read]
        end(first)
        change(tmp_path, 0, new)
        again = stack.enter_context(source(tmp_path))
        assert guest.read(4 * MIB, KIB) == content[4 * MIB : 4 * MIB + KIB]
        with daemon.monitor() as qmp:
            qmp.execute("overlay-invalidate", offset=0, length=changed)
            qmp.execute("overlay-activate")
        content = new + content[changed:]
        assert guest.read(0, SIZE) == content
        end(again)
        stack.enter_context(source(tmp_path))
        daemon.wait_until_connected()
        assert guest.read(0, SIZE) == content


@both
def test_a_disk_of_which_a_part_is_copied_again_and_again_is_known_by_the_rest(
    layout: Layout, tmp_path: Path
) -> None:
    """What was copied last is what the guest is most likely to have changed once more."""
    content, hot = random_disk(tmp_path / "disk", SIZE), 4 * MIB
    image = make_overlay(tmp_path / "overlay", layout, SIZE, uri(tmp_path))
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        options = ("--pre-copy", "--stream", "--reconnect-timeout=5")
        daemon = stack.enter_context(overlay(image, *options, directory=tmp_path))
        qmp = stack.enter_context(daemon.monitor())
        for number in range(2):
            daemon.wait_for_status(60.0, ready=True, local=SIZE)
            change(tmp_path, hot, random_bytes(SIZE - hot, seed=number + 2))
            qmp.execute("overlay-invalidate", offset=hot, length=SIZE - hot)
        daemon.wait_for_status(60.0, ready=True, local=SIZE)
        end(first)
        change(tmp_path, hot, last := random_bytes(SIZE - hot, seed=9))
        again = stack.enter_context(source(tmp_path))
        daemon.wait_until_connected()
        end(again)
        # Another disk is none the less one.
        random_disk(tmp_path / "disk", SIZE, seed=5)
        other = stack.enter_context(source(tmp_path))
        wait_for_refusal(daemon)
        end(other)
        (tmp_path / "disk").write_bytes(content[:hot] + last)
        stack.enter_context(source(tmp_path))
        daemon.wait_until_connected()
        qmp.execute("overlay-invalidate", offset=hot, length=SIZE - hot)
        qmp.execute("overlay-activate")
        daemon.wait_for_status(60.0, phase="done")
        with daemon.guest() as guest:
            assert guest.read(0, SIZE) == content[:hot] + last


@both
def test_a_daemon_that_is_restarted_before_the_guest_comes_knows_a_changed_disk_again(
    layout: Layout, tmp_path: Path
) -> None:
    content, new = random_disk(tmp_path / "disk", SIZE), random_bytes(MIB, seed=9)
    image = make_overlay(tmp_path / "overlay", layout, SIZE, uri(tmp_path))
    with source(tmp_path):
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, 2 * MIB) == content[: 2 * MIB]
        change(tmp_path, 0, new)
        with (
            overlay(image, "--reconnect-timeout=5", directory=tmp_path) as daemon,
            daemon.guest() as guest,
            daemon.monitor() as qmp,
        ):
            daemon.wait_until_connected()
            qmp.execute("overlay-invalidate", offset=0, length=MIB)
            qmp.execute("overlay-activate")
            assert guest.read(0, SIZE) == new + content[MIB:]


def test_what_was_not_told_from_another_disk_before_is_when_the_guest_has_come(tmp_path: Path) -> None:
    """In the flat layout; a QED image does not say which of its blocks were copied."""
    content = random_disk(tmp_path / "disk", SIZE)
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri(tmp_path))
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=1", directory=tmp_path))
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, MIB) == content[:MIB]
        end(first)
        # Two disks made from the same template begin alike.
        change(tmp_path, 256 * KIB, random_bytes(SIZE - 256 * KIB, seed=2))
        stack.enter_context(source(tmp_path))
        daemon.wait_until_connected()
        with daemon.monitor() as qmp:
            qmp.execute("overlay-activate")
        wait_for_refusal(daemon)
        with pytest.raises(OSError):
            guest.read(4 * MIB, 4 * KIB)
        assert guest.read(0, MIB) == content[:MIB]


@pytest.mark.parametrize("is_same", [True, False])
def test_what_was_copied_is_compared_when_an_armed_daemon_is_told_that_the_guest_is_here(
    is_same: bool, tmp_path: Path
) -> None:
    content, new = random_disk(tmp_path / "disk", SIZE), random_bytes(4 * KIB, seed=3)
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri(tmp_path))
    with source(tmp_path):
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            assert guest.read(0, MIB) == content[:MIB]
        if not is_same:
            random_disk(tmp_path / "disk", SIZE, seed=2)
        arguments = ["--armed", "--reconnect-timeout=1"]
        with overlay(image, *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_until_connected()
            guest.write(0, new)
            if is_same:
                assert guest.read(0, SIZE) == new + content[4 * KIB :]
                assert daemon.status()["sources"][0]["connected"]
            else:
                wait_for_refusal(daemon)


def test_connections_of_a_server_that_tells_another_size_are_not_used(tmp_path: Path) -> None:
    """As while the disk behind it is being replaced."""
    content = random_disk(tmp_path / "disk", SIZE)
    script = tmp_path / "sizes.sh"
    script.write_text(
        f"""#!/bin/bash
        case "$1" in
            get_size) if mkdir {tmp_path}/asked; then echo {SIZE}; else echo {SIZE // 2}; fi ;;
            can_write) exit 3 ;;
            pread) dd if={tmp_path}/disk iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none ;;
            *) exit 2 ;;
        esac
        """
    )
    script.chmod(0o755)
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri(tmp_path))
    with (
        nbdkit("sh", script, directory=tmp_path) as server,
        overlay(image, f"--backing={server.uri()}", "--stream", directory=tmp_path) as daemon,
        daemon.guest() as guest,
    ):
        wait_until(lambda: "told another size" in daemon.log.read_text(), "a second one is tried", 10)
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == content


def tell(daemon: Daemon, command: str, **given: object) -> None:
    """Execute a command of its monitor."""
    with daemon.monitor() as qmp:
        qmp.execute(command, **given)


def test_a_disk_that_is_at_another_address_now_is_read_there_while_its_guest_waits(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", SIZE)
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri(tmp_path))
    elsewhere = UnixAddress(tmp_path / "elsewhere.sock")
    with ExitStack() as stack:
        first = stack.enter_context(source(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=60", directory=tmp_path))
        tell(daemon, "overlay-activate")
        guest = stack.enter_context(daemon.guest())
        assert guest.read(0, 64 * KIB) == content[: 64 * KIB]
        end(first)
        pool = stack.enter_context(ThreadPoolExecutor())
        waiting = pool.submit(guest.read, MIB, 64 * KIB)
        stack.enter_context(nbdserve("--read-only", tmp_path / "disk", directory=tmp_path, at=elsewhere))
        tell(daemon, "overlay-backing", backing=[elsewhere.uri()])
        assert waiting.result(30.0) == content[MIB : MIB + 64 * KIB]
        assert [each["uri"] for each in daemon.status()["sources"]] == [elsewhere.uri()]


def test_another_disk_at_the_new_address_is_refused(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", SIZE)
    (tmp_path / "other").write_bytes(random_bytes(SIZE, seed=3))
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, uri(tmp_path))
    elsewhere = UnixAddress(tmp_path / "elsewhere.sock")
    with ExitStack() as stack:
        stack.enter_context(source(tmp_path))
        daemon = stack.enter_context(overlay(image, "--reconnect-timeout=1", directory=tmp_path))
        tell(daemon, "overlay-activate")
        guest = stack.enter_context(daemon.guest())
        guest.read(0, 64 * KIB)
        stack.enter_context(nbdserve("--read-only", tmp_path / "other", directory=tmp_path, at=elsewhere))
        tell(daemon, "overlay-backing", backing=[elsewhere.uri()])
        wait_for_refusal(daemon)
        with pytest.raises(OSError):
            guest.read(MIB, 64 * KIB)
