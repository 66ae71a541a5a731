"""A Linux guest that runs one shell script and powers off: busybox, modules, stock programs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from recipes.demo import initramfs, kernel
from tests.support.processes import Process

NETWORK = ("virtio_pci", "virtio_net")
"""Modules for a network card; with QEMU's user network the host's loopback is 10.0.2.2 in the guest."""

_PREAMBLE = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done < /modules/order
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
mkdir -p /tmp /mnt /etc /run
( set -e
"""

_EPILOGUE = """
)
echo "SCRIPT ENDED WITH $?"
poweroff -f
"""


def run_in_guest(
    directory: Path, script: str, *, modules: Sequence[str], programs: Sequence[str], seconds: float = 90.0
) -> str:
    """Boot, run the script under ``set -e`` and return the console; fails unless the script ends with 0.

    ``programs`` are dynamically linked programs of this machine, taken along with their libraries.
    """
    archive = directory / "appliance.cpio"
    init = directory / "appliance-init"
    init.write_text(_PREAMBLE + script + _EPILOGUE)
    linux = kernel.fetch()
    initramfs.build(archive, linux, modules=(*NETWORK, *modules), init=init)
    with archive.open("ab") as output:
        output.write(archive_of(with_libraries(programs)))
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none"),
        *("-no-reboot", "-kernel", str(linux.image), "-initrd", str(archive)),
        *("-append", "console=ttyS0 quiet panic=-1 no_timer_check", "-serial", "stdio"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0"),
    ]
    with Process(command, directory / "appliance.log") as guest:
        guest.wait(seconds)
        console = guest.output().replace("\r", "")
    assert re.search(r"^SCRIPT ENDED WITH 0$", console, re.MULTILINE), console
    return console


def with_libraries(programs: Sequence[str]) -> list[str]:
    """The absolute paths of programs, or of shared objects, and of all shared objects that they load."""
    paths: dict[str, None] = {}
    for program in programs:
        # Administration programs are not on every user's PATH; what is no program is named by its path.
        found = program if "/" in program else shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
        assert found is not None, f"{program} is not installed"
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True, timeout=240)
        paths.update(dict.fromkeys([found, *re.findall(r"(/\S+) \(0x", listed.stdout)]))
    return list(paths)


def archive_of(paths: Sequence[str], root: Path = Path("/")) -> bytes:
    """A cpio archive of files at their paths from ``root``, with their directories; links are followed."""
    names = {part for path in paths for part in Path(path).parents if part.name}
    listing = [str(name).lstrip("/") for name in sorted(names)] + [path.lstrip("/") for path in paths]
    done = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-L"],
        cwd=root,
        input="\n".join(listing).encode(),
        capture_output=True,
        check=True,
        timeout=240,
    )
    return done.stdout
