"""The guest's root file system: busybox, its init, and the modules it loads, in one cpio archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbdserve.common.errors import OperatorError
from recipes.demo.kernel import Kernel

BUSYBOX = Path("/bin/busybox")
INIT = Path(__file__).with_name("init")
MODULES = ("virtio_pci", "virtio_blk")
LIMIT = 60.0  # seconds


def build(
    archive: Path,
    kernel: Kernel,
    *,
    modules: Sequence[str] = MODULES,
    init: Path = INIT,
    busybox: Path = BUSYBOX,
) -> None:
    """Write the initramfs; the same inputs give the same bytes.

    The modules, and what they need, lie in ``/modules``, and ``/modules/order`` lists their paths in the
    order in which ``init`` has to load them. Raises OperatorError when busybox is missing or needs libraries,
    UsageError for a module that the kernel does not have.
    """
    with tempfile.TemporaryDirectory(prefix="nbd-migrate-initramfs-") as scratch:
        root = Path(scratch)
        for name in ("bin", "dev", "modules", "proc", "run", "sys"):
            (root / name).mkdir()
        _copy(_static(busybox), root / "bin/busybox", 0o755)
        _copy(init, root / "init", 0o755)
        files = kernel.in_load_order(modules)
        for file in files:
            _copy(file, root / "modules" / file.name, 0o644)
        (root / "modules/order").write_text("".join(f"/modules/{file.name}\n" for file in files))
        _pack(root, archive)


def _static(busybox: Path) -> Path:
    """Return the path itself, after a look at whether the program can run where there are no libraries."""
    try:
        head = busybox.open("rb").read(4096)
    except OSError as error:
        raise OperatorError(f"{busybox}: {error.strerror}; install busybox-static") from error
    if b"/ld-linux" in head:
        raise OperatorError(f"{busybox}: needs shared libraries; install busybox-static")
    return busybox


def _copy(source: Path, target: Path, mode: int) -> None:
    shutil.copyfile(source, target)
    target.chmod(mode)


def _pack(root: Path, archive: Path) -> None:
    """Archive the directory in cpio's "newc" layout, without traces of when and by whom it was made."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    for name in names:
        (root / name).chmod(0o755 if (root / name).is_dir() else (root / name).stat().st_mode)
        os.utime(root / name, (0, 0))
    with archive.open("wb") as output:
        try:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc", "--reproducible", "--owner=0:0"],
                cwd=root,
                input="\n".join(names).encode(),
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=LIMIT,
                check=True,
            )
        except FileNotFoundError as error:
            raise OperatorError("cpio is not installed; install it, or run 'make setup'") from error
        except subprocess.SubprocessError as error:
            complaint = getattr(error, "stderr", None) or b""
            raise OperatorError(
                f"{archive}: cpio failed: {complaint.decode(errors='replace') or error}"
            ) from error
