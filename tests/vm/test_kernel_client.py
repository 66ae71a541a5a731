"""The Linux kernel's own NBD client, in a guest, against nbdserve on the host."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import versions
from tests.support.appliance import run_in_guest
from tests.support.servers import TcpAddress, free_tcp_address, nbdserve

SIZE = 128 << 20

SCRIPT = """
nbd-client 10.0.2.2 {port} /dev/nbd0 -N disk -b 4096 {connections}
until [ "$(blockdev --getsize64 /dev/nbd0)" != 0 ]; do sleep 0.1; done
blockdev --getsize64 /dev/nbd0 | sed 's/^/SIZE /'
mkfs.ext4 -q -E nodiscard /dev/nbd0
mount -t ext4 -o discard /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/kept bs=64k count=320 status=none
dd if=/dev/urandom of=/mnt/gone bs=64k count=160 status=none
sync
rm /mnt/gone
mkdir /mnt/many
for number in $(seq 200); do echo "$number" > /mnt/many/$number; done
sha256sum /mnt/kept | sed 's/^/SUM /'
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
e2fsck -f -n /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
sha256sum /mnt/kept | sed 's/^/AGAIN /'
umount /mnt
nbd-client -d /dev/nbd0
"""


@pytest.mark.representative
def test_a_file_system_made_and_used_through_the_kernels_client_is_sound_on_the_host(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    address = free_tcp_address()
    # nbd-client has no such option any more since 3.26.
    connections = "-C 2" if versions.nbd_client() < (3, 26) else ""
    assert isinstance(address, TcpAddress)
    with nbdserve(image, "-f", "raw", "-x", "disk", directory=tmp_path, at=address) as server:
        console = run_in_guest(
            tmp_path,
            SCRIPT.format(port=address.port, connections=connections),
            modules=("nbd", "ext4", "crc32c_generic"),
            programs=("nbd-client", "mkfs.ext4", "e2fsck"),
        )
        assert server.process.terminate() == 0
    assert f"SIZE {SIZE}" in console
    first, again = re.findall(r"^(?:SUM|AGAIN) ([0-9a-f]{64})", console, re.MULTILINE)
    assert first == again
    subprocess.run(["/sbin/e2fsck", "-f", "-n", image], check=True, timeout=240, capture_output=True)
    dumped = tmp_path / "kept"
    dump = ["/sbin/debugfs", "-R", f"dump /kept {dumped}", str(image)]
    subprocess.run(dump, check=True, timeout=240, capture_output=True)
    assert hashlib.sha256(dumped.read_bytes()).hexdigest() == first
