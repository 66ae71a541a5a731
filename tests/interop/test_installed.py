"""The project as ``pip install .`` puts it into an ordinary environment, which has no libnbd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from overlay.formats.flat import create as flat
from overlay.formats.image import Backing
from tests.support.disks import MIB, random_disk
from tests.support.processes import Argument, Process, check, run
from tests.support.servers import Server, UnixAddress, nbdserve
from tests.support.vms import ROOT, Scene, running

README = (ROOT / "README.md").read_text()
PARTS = ["nbdserve", "overlay", "recipes", "pyproject.toml", "README.md", "LICENSE"]

MISSING = (
    r"libnbd's Python module is not here \(No module named 'nbd'\): install python3-libnbd \(Debian, Ubuntu, "
    r"Fedora\) or libnbd \(Arch\), and use the system's own Python; a virtual environment sees it if it was "
    r"made by /usr/bin/python3 -m venv --system-site-packages"
)
ANOTHER = (
    r"the Python module nbd in \S+/nbd/__init__.py is another package, not libnbd's: remove it "
    r"\(pip uninstall nbd\); install python3-libnbd .*"
)


@dataclass(frozen=True)
class Installed:
    """An environment with the three commands."""

    path: Path
    refusal: str
    """What it says where libnbd is needed, as a regular expression."""
    environment: dict[str, str]
    """Variables for its commands."""

    def run(self, name: str, *arguments: Argument, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of its commands to the end."""
        return run(self.program(name), *arguments, cwd=cwd, seconds=60, env=self.environment)

    def program(self, name: str) -> Path:
        """One of its commands."""
        return self.path / "bin" / name


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, as building it leaves something behind."""
    source = tmp_path_factory.mktemp("sources")
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, source / part)
    return source


@pytest.fixture(scope="module")
def environment(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install .`` makes in an environment without the system's modules.

    The dependencies come from ours, so that no network is needed.
    """
    path = tmp_path_factory.mktemp("installed") / "venv"
    check(sys.executable, "-m", "venv", "--without-pip", path)
    (packages,) = path.glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip: list[Argument] = [sys.executable, "-m", "pip", "--python", path / "bin" / "python", "install"]
    check(*pip, *options, sources, seconds=120)
    return path


@pytest.fixture(params=["without libnbd", "with PyPI's nbd"])
def installed(request: pytest.FixtureRequest, environment: Path, tmp_path: Path) -> Installed:
    """The environment as it is, and with another thing in libnbd's place."""
    if request.param == "without libnbd":
        return Installed(environment, MISSING, {})
    other = tmp_path / "others" / "nbd"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '0.2'\n")
    return Installed(environment, ANOTHER, {"PYTHONPATH": str(other.parent)})


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Server]:
    """A server with a disk of 1 MiB."""
    random_disk(tmp_path / "disk.img", MIB)
    with nbdserve("-f", "raw", "-r", tmp_path / "disk.img", directory=tmp_path) as server:
        yield server


def overlay_of(server: Server, directory: Path) -> Path:
    """An overlay on top of a server."""
    path = directory / "overlay.img"
    flat.create(path, flat.new_header(MIB, (Backing(server.uri(), raw=True),)))
    return path


NEEDY = {
    "a proxy": ["nbdserve", "-k", "sock", "{uri}"],
    "a formatted image": ["nbdserve", "-k", "sock", "-f", "qcow2", "disk.qcow2"],
    "create": ["nbd-overlay", "create", "--backing", "{uri}", "new.img"],
    "serve": ["nbd-overlay", "serve", "overlay.img", "-k", "sock"],
    "serve in the background": ["nbd-overlay", "serve", "overlay.img", "-k", "sock", "--daemonize"],
    "verify": ["nbd-overlay", "verify", "overlay.img"],
    "probe": ["nbd-migrate", "probe", "{uri}"],
    "demo": ["nbd-migrate", "demo", "--size", "64M"],
}


@pytest.mark.parametrize("what", NEEDY)
@pytest.mark.sampled(4)
def test_what_needs_libnbd_says_in_a_line_which_package_has_it(
    installed: Installed, source: Server, tmp_path: Path, what: str
) -> None:
    overlay_of(source, tmp_path)
    check("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    program, *arguments = [word.format(uri=source.uri()) for word in NEEDY[what]]
    done = installed.run(program, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"{program}: {installed.refusal}\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "new.img").exists()
    assert not (tmp_path / "sock").exists()


def test_a_migration_says_so_too_and_the_guest_is_not_touched(installed: Installed, tmp_path: Path) -> None:
    stage = Scene(tmp_path)
    with running(stage):
        done = installed.run("nbd-migrate", "run", stage.plan_file(), cwd=tmp_path)
        assert done.returncode == 1
        assert re.search(installed.refusal, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
        stage.wait_until_guest_works("a")


@pytest.mark.parametrize(
    "words",
    [
        *(["nbdserve", option] for option in ("--help", "--version")),
        *(["nbd-overlay", option] for option in ("--help", "--version")),
        *(
            ["nbd-overlay", command, "--help"]
            for command in ("create", "serve", "verify", "stream", "status")
        ),
        *(["nbd-migrate", *words] for words in (["--help"], ["run", "--help"], ["demo", "--help"])),
        *(["nbd-overlay", command, "overlay.img"] for command in ("info", "map", "check")),
        *(["nbd-overlay", command, "--json", "overlay.img"] for command in ("info", "map", "check")),
        ["nbd-overlay", "create", "--size", "1M", "--backing", "nbd://127.0.0.1:1/", "new.img"],
    ],
    ids=" ".join,
)
@pytest.mark.sampled(6)
def test_what_needs_no_server_needs_no_libnbd(
    installed: Installed, source: Server, tmp_path: Path, words: list[str]
) -> None:
    overlay_of(source, tmp_path)
    program, *arguments = words
    done = installed.run(program, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    if "--json" in words:
        json.loads(done.stdout)


def test_local_images_are_served_without_libnbd(installed: Installed, tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    address, pid_file = UnixAddress(tmp_path / "sock"), tmp_path / "pid"
    argv: list[Argument] = [
        installed.program("nbdserve"),
        "-f",
        "raw",
        "-k",
        address.path,
        "--pid-file",
        pid_file,
    ]
    options = ["--metrics", "127.0.0.1:0", "--qmp", f"unix:{tmp_path}/qmp"]
    argv += [*options, tmp_path / "disk.img"]
    with Process(argv, tmp_path / "log", env=installed.environment) as server:
        server.wait_for_pid_file(pid_file)
        check("nbdcopy", address.uri(), tmp_path / "copy.img")
        assert server.terminate() == 0
    assert (tmp_path / "copy.img").read_bytes() == (tmp_path / "disk.img").read_bytes()


def test_a_host_that_a_guest_leaves_over_one_connection_needs_no_libnbd(
    installed: Installed, tmp_path: Path
) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    token, disks = tmp_path / "token", UnixAddress(tmp_path / "disks")
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 2)
    channel: list[Argument] = [installed.program("nbdserve"), "channel", "--token-file", token]
    place, ready = f"unix:{tmp_path / 'channel'}", tmp_path / "b.pid"
    listens = [*channel, "--listen", place, "--socket", disks.path, "--pid-file", ready]
    connects = [*channel, "--connect", place, "--export", f"vm={tmp_path / 'disk.img'},format=raw"]
    with Process(listens, tmp_path / "b.log", env=installed.environment) as b:
        b.wait_for_pid_file(ready)
        for number, form in enumerate((["--resume"], ["--ram", f"unix:{tmp_path / 'ram'}"])):
            log, copy = tmp_path / f"a{number}.log", tmp_path / f"copy{number}.img"
            with Process([*connects, *form], log, env=installed.environment) as a:
                a.wait_for_line("connected", 60.0)
                check("nbdcopy", disks.uri("vm"), copy)
                a.terminate()
            assert copy.read_bytes() == (tmp_path / "disk.img").read_bytes()
