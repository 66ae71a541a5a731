"""The demo's kernel and initramfs, from a small Debian archive of our own and with the real apt and dpkg."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdserve.common.errors import OperatorError, UsageError
from recipes.demo import initramfs, kernel
from tests.support.processes import check, run

RELEASE = "6.9.0-3-cloud-amd64"
PACKAGES = {
    "linux-image-cloud-amd64": f"Depends: linux-image-{RELEASE} (= 6.9.1-1)\n",
    f"linux-image-{RELEASE}": "",
}
FETCH = """
import pathlib, sys
from recipes.demo import kernel
print(kernel.fetch(pathlib.Path(sys.argv[1])).image)
"""
PLACES = {"Debian 12": f"lib/modules/{RELEASE}", "Debian 13": f"usr/lib/modules/{RELEASE}"}
"""Where the package has its modules."""


def package(directory: Path, name: str, depends: str, modules: str) -> str:
    """Build a package and return its paragraph for the archive's list."""
    tree = directory / name
    (tree / "DEBIAN").mkdir(parents=True)
    version = "6.9.1-1"
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\n"
        f"{depends}Description: a kernel for a test\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    if not depends:
        (tree / "boot").mkdir()
        (tree / f"boot/vmlinuz-{RELEASE}").write_bytes(os.urandom(1 << 16))
        (tree / modules).mkdir(parents=True)
        (tree / modules / "modules.order").write_text("")
        (tree / modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    archive = directory / f"{name}_{version}_amd64.deb"
    check("dpkg-deb", "--root-owner-group", "-b", tree, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return f"{control}Filename: ./{archive.name}\nSize: {archive.stat().st_size}\nSHA256: {digest}\n\n"


@pytest.fixture(params=PLACES)
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A Debian archive that apt uses instead of the machine's; its lists are not fetched yet."""
    directory = tmp_path / "archive"
    directory.mkdir()
    packages = [package(directory, *each, PLACES[request.param]) for each in PACKAGES.items()]
    (directory / "Packages").write_text("".join(packages))
    (directory / "sources.list").write_text(f"deb [trusted=yes] file:{directory} ./\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (tmp_path / name).mkdir(parents=True)
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::State::Lists "{tmp_path}/lists"; Dir::Cache "{tmp_path}/cache"; APT::Architecture "amd64";\n'
        f'Dir::Etc::SourceList "{directory}/sources.list"; Dir::Etc::SourceParts "-";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    return directory


@pytest.fixture
def listed(archive: Path) -> Path:
    """The same, after ``apt-get update``."""
    check("apt-get", "-q", "-o", "APT::Sandbox::User=root", "update")
    return archive


def test_the_metapackages_kernel_is_downloaded_and_unpacked_once(listed: Path, tmp_path: Path) -> None:
    fetched = kernel.fetch(tmp_path / "home")
    assert fetched.release == RELEASE
    package_image = listed / f"linux-image-{RELEASE}/boot/vmlinuz-{RELEASE}"
    assert fetched.image.read_bytes() == package_image.read_bytes()
    assert fetched.in_load_order(["ext4"]) == []
    for each in listed.glob("*.deb"):
        each.unlink()
    assert kernel.fetch(tmp_path / "home") == fetched


def test_two_at_once_download_it_one_after_the_other(listed: Path, tmp_path: Path) -> None:
    def fetch(_: int) -> str:
        return check(sys.executable, "-c", FETCH, tmp_path / "home")

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(fetch, range(3)))
    assert len(set(images)) == 1
    assert Path(images[0].strip()).stat().st_size == 1 << 16
    assert {path.name for path in (tmp_path / "home/kernel").iterdir()} == {RELEASE, "lock"}


def test_what_a_killed_download_left_is_no_kernel_and_is_cleared_away(listed: Path, tmp_path: Path) -> None:
    # A dpkg-deb that never ends, so that the kill strikes in the middle of the unpacking.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "dpkg-deb").write_text('#!/bin/sh\nmkdir -p "$3/boot"\nkill -STOP $$\n')
    (tools / "dpkg-deb").chmod(0o755)
    home = tmp_path / "home"
    path = f"{tools}:{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-c", FETCH, home], env={**os.environ, "PATH": path}, start_new_session=True
    ) as process:
        while not list(home.glob("kernel/.unpacking-*/*/boot")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert kernel.fetch(home).image.stat().st_size == 1 << 16
    assert {each.name for each in (home / "kernel").iterdir()} == {RELEASE, "lock"}


def test_missing_package_lists_are_one_line_that_says_what_to_run(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"package lists do not know.*'apt-get update'") as error:
        kernel.fetch(tmp_path / "home")
    assert "\n" not in str(error.value)


def test_a_download_that_fails_is_one_line_and_leaves_no_half_kernel(listed: Path, tmp_path: Path) -> None:
    for each in listed.glob("*.deb"):
        each.unlink()
    with pytest.raises(
        OperatorError, match=f"{RELEASE} 6.9.1-1 cannot be downloaded.*apt-get update"
    ) as error:
        kernel.fetch(tmp_path / "home")
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "home/kernel").iterdir()] == ["lock"]


def test_the_newest_of_several_cached_kernels_is_taken(tmp_path: Path) -> None:
    for release in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-99-cloud-amd64"):
        (tmp_path / "kernel" / release / "boot").mkdir(parents=True)
    assert kernel.fetch(tmp_path).release == "6.1.0-56-cloud-amd64"


def test_modules_come_after_what_they_need_and_built_in_ones_not_at_all() -> None:
    files = kernel.fetch().in_load_order(["virtio-blk", "virtio_pci", "nbd", "ext4"])
    order = [file.name.removesuffix(".xz") for file in files]
    chain = [name for name in ("virtio_ring.ko", "virtio.ko", "virtio_blk.ko") if name in order]
    assert chain == sorted(chain, key=order.index)
    assert chain[-1] == "virtio_blk.ko"
    assert "nbd.ko" in order
    assert not any(name.startswith("ext4") for name in order)
    assert len(set(order)) == len(order)
    with pytest.raises(UsageError, match="has no module virtio_perpetuum"):
        kernel.fetch().in_load_order(["virtio_perpetuum"])


def test_the_same_inputs_give_the_same_initramfs(tmp_path: Path) -> None:
    fetched = kernel.fetch()
    for name in ("one", "two"):
        initramfs.build(tmp_path / name, fetched)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with (tmp_path / "one").open("rb") as archive:
        listing = subprocess.run(
            ["cpio", "-tv", "--quiet"], stdin=archive, capture_output=True, text=True, timeout=240
        )
    lines = listing.stdout.splitlines()
    assert all("root     root" in line and "Jan  1  1970" in line for line in lines)
    assert any(line.startswith("-rwxr-xr-x") and line.endswith(" init") for line in lines)


def test_a_busybox_that_needs_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="/bin/ls: needs shared libraries; install busybox-static"):
        initramfs.build(tmp_path / "archive", kernel.fetch(), busybox=Path("/bin/ls"))
    with pytest.raises(OperatorError, match="gone: No such file or directory; install busybox-static"):
        initramfs.build(tmp_path / "archive", kernel.fetch(), busybox=tmp_path / "gone")


def test_the_guests_program_is_sound_shell() -> None:
    done = run(Path(sys.executable).with_name("shellcheck"), initramfs.INIT)
    assert done.returncode == 0, done.stdout
