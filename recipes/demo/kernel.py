"""The guest's kernel: Debian's own, downloaded and unpacked into a cache, never installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.clock import Clock
from nbdserve.common.errors import OperatorError, UsageError

METAPACKAGE = "linux-image-cloud-amd64"
DOWNLOAD_LIMIT = 300.0  # seconds for 27 MB
UNPACK_LIMIT = 120.0


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package.

    release  what ``uname -r`` says in the guest
    root     directory that the package was unpacked into
    """

    release: str
    root: Path

    @property
    def image(self) -> Path:
        """Return the file for QEMU's ``-kernel``."""
        return self.root / f"boot/vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """Directory that module paths are relative to."""
        return self.root / f"lib/modules/{self.release}"

    def in_load_order(self, names: Sequence[str]) -> list[Path]:
        """Return the files of these modules and of all that they need, each after what it needs itself.

        Names are as ``modprobe`` takes them; what is built into the kernel has no file and is left out.
        Raises UsageError for a module that this kernel does not have.
        """
        needs = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, needed = line.partition(":")
            needs[_module_name(path)] = (path, needed.split())
        built_in = {
            _module_name(line) for line in (self.modules / "modules.builtin").read_text().splitlines()
        }
        order: dict[str, None] = {}
        for name in map(_module_name, names):
            if name in built_in:
                continue
            if name not in needs:
                raise UsageError(f"kernel {self.release} has no module {name}")
            file, dependencies = needs[name]
            # modules.dep names all dependencies, also indirect ones, in the order of unloading.
            order.update(dict.fromkeys([*reversed(dependencies), file]))
        return [self.modules / path for path in order]


def default_cache() -> Path:
    """Return where kernels are kept: ``nbd-migrate`` in the user's cache directory (XDG base directories)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nbd-migrate"


def fetch(cache: Path | None = None) -> Kernel:
    """Return the newest kernel in the cache; download one, as any user, when there is none yet.

    Raises OperatorError when the package lists are missing or the download fails.
    """
    directory = (cache or default_cache()) / "kernel"
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock"):
        return _newest(directory) or _download(directory)


def _newest(directory: Path) -> Kernel | None:
    """Return the unpacked kernel with the highest release, or None."""
    kernels = [Kernel(path.name, path) for path in directory.iterdir() if (path / "boot").is_dir()]
    return max(kernels, key=lambda kernel: _by_number(kernel.release), default=None)


def _download(directory: Path) -> Kernel:
    """Download and unpack the kernel that the metapackage stands for; it appears in the cache whole."""
    package, version = _kernel_package()
    for abandoned in directory.glob(".unpacking-*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".unpacking-") as scratch:
        # apt gives up its rights for a download; that fails without harm where its user may not write.
        options = ["-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=20", "-o", "APT::Sandbox::User="]
        _run(
            ["apt-get", "-q", *options, "download", f"{package}={version}"],
            Path(scratch),
            DOWNLOAD_LIMIT,
            f"{package} {version} cannot be downloaded",
            "is there a network, and has 'apt-get update' been run lately?",
        )
        archive = next(Path(scratch).glob("*.deb"))
        release = package.removeprefix("linux-image-")
        root = Path(scratch) / release
        what, advice = f"{archive.name} cannot be unpacked", f"is there space in {directory}?"
        _run(["dpkg-deb", "-x", str(archive), str(root)], Path(scratch), UNPACK_LIMIT, what, advice)
        if not (root / "lib").exists():
            # Since Debian 13 the modules are in usr/lib, where depmod does not look.
            (root / "lib").symlink_to("usr/lib")
        # kmod's own directory is not on every user's PATH.
        depmod = shutil.which("depmod", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "depmod"
        _run([depmod, "-b", str(root), release], Path(scratch), UNPACK_LIMIT, what, "is kmod installed?")
        root.rename(directory / release)
    return Kernel(release, directory / release)


def _kernel_package() -> tuple[str, str]:
    """Name and version of the package that the metapackage depends on."""
    advice = "run 'apt-get update' as root, or 'make setup'"
    missing = f"the package lists do not know {METAPACKAGE}"
    show = ["apt-cache", "show", "--no-all-versions", METAPACKAGE]
    fields = _run(show, Path("/"), UNPACK_LIMIT, missing, advice)
    found = re.search(r"^Depends:.*?(linux-image-\S+) \(= ([^)]+)\)", fields, re.MULTILINE)
    if not found:
        raise OperatorError(f"{missing}: {advice}")
    return found[1], found[2]


def _run(argv: list[str], directory: Path, seconds: float, what: str, advice: str) -> str:
    """Run a command and return its output; OperatorError with ``what``, its last complaint and ``advice``."""
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        raise OperatorError(f"{what}: there is no {argv[0]} on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise OperatorError(f"{what}: {argv[0]} took more than {seconds:g} s; {advice}") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if not line.startswith("W:")] or [""]
        raise OperatorError(f"{what}: {complaints[0]}; {advice}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time download; the others wait and then find what it has left in the cache."""
    limits = Clock()
    deadline = limits.now() + DOWNLOAD_LIMIT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if limits.now() > deadline:
                    raise OperatorError(f"{path}: held by another download for too long") from error
            time.sleep(0.1)
        yield


def _module_name(path: str) -> str:
    """Return a module's name, in which ``-`` and ``_`` are the same, from its path or from a name."""
    return Path(path).name.partition(".")[0].replace("-", "_")


def _by_number(release: str) -> list[int]:
    """Return a key that sorts 6.1.0-9 before 6.1.0-10."""
    return [int(number) for number in re.findall(r"\d+", release)]
