"""A source with sectors that it cannot read: they fail, and nothing else does or stays behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.overlays import CLUSTER, LAYOUTS, Daemon, Layout, end, make_overlay, overlay
from tests.support.processes import wait_until
from tests.support.servers import Server, nbdkit, nbdserve

SIZE = 8 * MIB
SECTOR = 512

both = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def broken(directory: Path, *sectors: int) -> Iterator[Server]:
    """A source that cannot read some sectors, as long as the file ``mended`` does not exist."""
    disk = directory / "source.img"
    random_disk(disk, SIZE)
    script = directory / "broken.sh"
    script.write_text(
        f"""#!/bin/bash
        case "$1" in
            get_size) echo {SIZE} ;;
            can_write) exit 3 ;;
            pread)
                for bad in {" ".join(map(str, sectors))}; do
                    if [ ! -e {directory}/mended ] && [ $4 -lt $((bad + 512)) ] &&
                        [ $(($4 + $3)) -gt $bad ]; then
                        echo "EIO a bad sector" >&2; exit 1
                    fi
                done
                dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none ;;
            *) exit 2 ;;
        esac
        """
    )
    script.chmod(0o755)
    with nbdkit("sh", script, directory=directory) as server:
        yield server


def all_connected(daemon: Daemon) -> bool:
    """Whether every source of a daemon is."""
    return all(told["connected"] for told in daemon.status()["sources"])


@both
def test_of_a_streamed_disk_only_the_clusters_with_bad_sectors_are_absent(
    layout: Layout, tmp_path: Path
) -> None:
    content, cluster = random_bytes(SIZE), CLUSTER[layout]
    bad = [5 * MIB + 200 * KIB + 512, 5 * MIB + 204 * KIB, 7 * MIB, SIZE - SECTOR]
    absent = sorted({place // cluster * cluster for place in bad})
    with broken(tmp_path, *bad) as server:
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        arguments = ["--stream", "--reconnect-timeout=1"]
        with overlay(image, *arguments, directory=tmp_path) as daemon, daemon.guest() as guest:
            told = daemon.wait_for_status(phase="failed")
            assert told["local"] == SIZE - len(absent) * cluster
            assert f"at {absent[0]} cannot be read" in told["error"]
            for place in bad:
                with pytest.raises(OSError) as failed:
                    guest.read(place, SECTOR)
                assert failed.value.errno == errno.EIO
            # What lies beside it can be read, as it could from the source itself.
            assert guest.read(bad[0] - SECTOR, SECTOR) == content[bad[0] - SECTOR : bad[0]]
            assert guest.read(bad[2] + SECTOR, MIB // 2) == content[bad[2] + SECTOR :][: MIB // 2]
            (tmp_path / "mended").touch()
            with daemon.monitor() as qmp:
                qmp.execute("block-job-resume", device="stream")
            daemon.wait_for_status(phase="done")
            end(server)
            assert guest.read(0, SIZE) == content


@both
def test_what_a_guest_reads_around_a_bad_sector_is_kept(layout: Layout, tmp_path: Path) -> None:
    content, cluster = random_bytes(SIZE), CLUSTER[layout]
    bad = 5 * MIB + 100 * KIB
    hole = bad // cluster * cluster
    with broken(tmp_path, bad) as server:
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--reconnect-timeout=1", directory=tmp_path) as daemon, daemon.guest() as guest:
            with pytest.raises(OSError):
                guest.read(5 * MIB, 256 * KIB)
            end(server)
            assert guest.read(5 * MIB, hole - 5 * MIB) == content[5 * MIB : hole]
            after, stop = hole + cluster, 5 * MIB + 256 * KIB
            assert guest.read(after, stop - after) == content[after:stop]
            with pytest.raises(OSError):
                guest.read(hole, cluster)
            # The guest's own write needs nothing of it.
            guest.write(hole, bytes(cluster))
            assert guest.read(hole, cluster) == bytes(cluster)


def test_what_one_source_cannot_read_is_read_from_another(tmp_path: Path) -> None:
    content = random_bytes(SIZE)
    with (
        broken(tmp_path, 3 * MIB) as bad,
        nbdserve("--read-only", tmp_path / "source.img", directory=tmp_path) as good,
    ):
        uris = [bad.uri(), good.uri()]
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, *uris)
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            wait_until(lambda: all_connected(daemon), "both are connected")
            assert guest.read(3 * MIB, 64 * KIB) == content[3 * MIB : 3 * MIB + 64 * KIB]
            with daemon.monitor() as qmp:
                qmp.execute("block-stream", device="disk")
            daemon.wait_for_status(phase="done")
            assert guest.read(0, SIZE) == content
