"""Whatever is wrong with a command line or a file: one line that names it, and the right exit code."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import check, run
from tests.support.servers import NBDSERVE, nbdserve

USAGE = 2
FAILED = 1

# Arguments (run in a directory that holds the image disk.img), the exit code, and what the line must name.
MISTAKES = [
    ([], USAGE, "nothing to serve"),
    (["--nonsense", "disk.img"], USAGE, "--nonsense"),
    (["--directory", ""], USAGE, "--directory: it is empty"),
    (["disk.img", "other.img"], USAGE, "other.img"),
    (["-f", "tar", "disk.img"], USAGE, "tar"),
    (["-f", "qcow2", "disk.img"], FAILED, "disk.img: .*not in qcow2 format"),
    (["-f", "qcow2", "missing.img"], FAILED, "missing.img: .*No such file"),
    (["--export", "a=disk.img,format=qcow2"], FAILED, "disk.img: .*not in qcow2 format"),
    (["--detect-zeroes", "maybe", "disk.img"], USAGE, "maybe"),
    (["--detect-zeroes", "unmap", "--discard", "ignore", "disk.img"], USAGE, "--discard"),
    (["--cache", "sometimes", "disk.img"], USAGE, "sometimes"),
    (["--reconnect-timeout", "-1", "disk.img"], USAGE, "-1"),
    (["--export", "a=disk.img,offset=much"], USAGE, "much"),
    (["--export", "a=disk.img,format=raw,size=2M"], USAGE, "disk.img.*2097152"),
    (["--export", "a=disk.img,format=raw,offset=512K,size=513K"], USAGE, "disk.img"),
    (["nbd://127.0.0.1:1/x"], FAILED, "127.0.0.1:1/x: .*refused"),
    (["nbd+unix:///?socket=missing.sock"], FAILED, "missing.sock.*No such file"),
    (["nbd://[::1"], USAGE, "::1"),
    (["-f", "qcow2", "nbd://127.0.0.1:1"], USAGE, "format"),
    (["--fence", "-r", "nbd://127.0.0.1:1"], USAGE, "--fence"),
    (["-p", "70000", "disk.img"], USAGE, "70000"),
    (["-p", "-1", "disk.img"], USAGE, "-p|-1"),
    (["-p", "http", "disk.img"], USAGE, "http"),
    (["-e", "many", "disk.img"], USAGE, "many"),
    (["-e", "-3", "disk.img"], USAGE, "-e|-3"),
    (["--max-connections", "1.5", "disk.img"], USAGE, "1.5"),
    (["--handshake-timeout", "0", "disk.img"], USAGE, "timeout"),
    (["--handshake-timeout", "nan", "disk.img"], USAGE, "nan"),
    (["--handshake-timeout", "soon", "disk.img"], USAGE, "soon"),
    (["-o", "-5", "disk.img"], USAGE, "-o|-5"),
    (["-o", "0x10", "disk.img"], USAGE, "0x10"),
    (["-f", "raw", "-o", "2097152", "disk.img"], USAGE, "disk.img.*2097152"),
    (["--discard", "perhaps", "disk.img"], USAGE, "perhaps"),
    (["-k", "nbd.sock", "-p", "10809", "disk.img"], USAGE, "-k"),
    (["-k", "nbd.sock", "-b", "127.0.0.1", "disk.img"], USAGE, "-k"),
    (["--listen", "http://localhost", "disk.img"], USAGE, "http"),
    (["--listen", "nbd://[::1", "disk.img"], USAGE, "::1"),
    (["--listen", "nbd://localhost:99999", "disk.img"], USAGE, "99999"),
    (["--listen", "nbd+unix:///", "disk.img"], USAGE, "socket"),
    (["--export", "disk.img"], USAGE, "NAME=FILE, and == for each ="),
    (["--export", "a=b=disk.img"], USAGE, "there is no file b=disk.img; if a = belongs to NAME, write =="),
    (["--export", "a==disk.img"], USAGE, "NAME=FILE"),
    (["--export", "a="], USAGE, "file"),
    (["--export", "a=disk.img,format=tar"], USAGE, "tar"),
    (["--export", "a=disk.img,sideways"], USAGE, "sideways"),
    (["--export", "a=disk.img,format=raw", "--export", "a=disk.img,format=raw"], USAGE, "'a'"),
    (["--export", "a=disk.img", "-x", "b"], USAGE, "-x"),
    (["--export", "n" * 5000 + "=disk.img,format=raw"], USAGE, "4096"),
    (["--allow", "192.0.2.1/24", "disk.img"], USAGE, "192.0.2.1/24"),
    (["--export", "\udcff=disk.img,format=raw"], USAGE, "UTF-8"),
    (["--allow", "everyone", "disk.img"], USAGE, "everyone"),
    (["--max-handshakes", "0", "disk.img"], USAGE, "max-handshakes|0"),
    (["--busy-poll", "1001", "disk.img"], USAGE, "--busy-poll: '1001' is more than 1000 microseconds"),
    (["--request-memory", "lots", "disk.img"], USAGE, "--request-memory 'lots'"),
    (["--user", "nobody-here", "disk.img"], USAGE, "nobody-here"),
    (["--group", "99999999999999999999", "disk.img"], USAGE, "9999"),
    (["--user", "1" * 5000, "disk.img"], USAGE, "there is no such user"),
    (["--group", "1" * 5000, "disk.img"], USAGE, "there is no such group"),
    (["--log-format", "xml", "disk.img"], USAGE, "xml"),
    (["--qmp", "tcp:127.0.0.1:4444", "disk.img"], USAGE, "tcp:127.0.0.1:4444"),
    (["--qmp", "unix:" + "x" * 108, "disk.img"], USAGE, "at most 107"),
    (["-b", "[::1", "disk.img"], USAGE, r"--bind .*\[::1"),
    (["-b", "[localhost]", "disk.img"], USAGE, r"--bind .*\[localhost\] is not an IPv6 address"),
    (["--metrics", "[::g]:9100", "disk.img"], USAGE, r"\[::g\] is not an IPv6 address"),
    (["--metrics", "9100", "disk.img"], USAGE, "HOST:PORT"),
    (["--metrics", "::1:9100", "disk.img"], USAGE, "brackets"),
    (["--metrics", "localhost:http", "disk.img"], USAGE, "localhost:http"),
    (["--metrics", "localhost:" + "1" * 5000, "disk.img"], USAGE, "HOST:PORT"),
    (["--metrics", "localhost:²", "disk.img"], USAGE, "HOST:PORT"),
    (["-f", "raw", "-k", "nbd.sock", "--metrics", "a..b:1", "disk.img"], FAILED, "'a..b' is no name"),
    (["--stdio", "--fork", "disk.img"], USAGE, "--fork"),
    (["--stdio", "-p", "1", "disk.img"], USAGE, "-p"),
    (["-f", "raw", "-k", "nbd.sock", "--qmp", "unix:missing/qmp", "disk.img"], FAILED, "missing/qmp"),
    (["-f", "raw", "-k", "nbd.sock", "--metrics", "no-such-host.invalid:1", "disk.img"], FAILED, "invalid:1"),
    (["missing.img"], FAILED, "missing.img: .*No such file"),
    (["-f", "raw", "missing.img"], FAILED, "missing.img: .*No such file"),
    (["--export", "a=missing.img,format=raw"], FAILED, "missing.img"),
    (["-f", "raw", "."], FAILED, r"\."),
    (["."], FAILED, r"\."),
    (["-f", "raw", "disk.img/x"], FAILED, "disk.img/x"),
    (["-f", "raw", "fifo"], FAILED, "fifo"),
    (["-f", "raw", "-r", "fifo"], FAILED, "fifo"),
    (["-r", "fifo"], FAILED, "fifo"),
    (["-f", "raw", "-r", "/dev/null"], FAILED, "/dev/null"),
    (["-f", "raw", "-k", "missing/nbd.sock", "disk.img"], FAILED, "missing/nbd.sock"),
    (["-f", "raw", "-k", "disk.img", "disk.img"], FAILED, "disk.img: .*in use"),
    (["-f", "raw", "-k", "x" * 200, "disk.img"], USAGE, "x" * 20),
    (["-f", "raw", "-b", "192.0.2.1", "-p", "0", "disk.img"], FAILED, "192.0.2.1"),
    (["-f", "raw", "-b", "no-such-host.invalid", "disk.img"], FAILED, "no-such-host.invalid"),
    (["-f", "raw", "-b", "a..b", "disk.img"], FAILED, "'a..b' is no name of a host"),
    (["-f", "raw", "-b", "x" * 300, "disk.img"], FAILED, "x' is no name of a host"),
    (["-f", "raw", "--listen", "nbd://.a", "disk.img"], USAGE, "'.a' is not a host's name or address"),
    (["-f", "raw", "-b", "\udcff", "disk.img"], FAILED, "is no name of a host"),
    (["-f", "raw", "-k", "nbd.sock", "--pid-file", "missing/pid", "disk.img"], FAILED, "missing/pid"),
    (["-f", "raw", "-k", "nbd.sock", "--pid-file", ".", "disk.img"], FAILED, "pid"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "names"), MISTAKES, ids=[" ".join(m[0])[:60] for m in MISTAKES]
)
@pytest.mark.sampled(40)
def test_a_mistake_is_one_line_and_the_right_exit_code(
    tmp_path: Path, arguments: list[str], code: int, names: str
) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    os.mkfifo(tmp_path / "fifo")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    done = run(NBDSERVE, *arguments, cwd=tmp_path, seconds=10)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(names, done.stderr), done.stderr
    assert done.stderr.startswith("nbdserve: ")
    assert done.stdout == ""
    assert done.returncode == code
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", MIB)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run(
            NBDSERVE, "-f", "raw", "-b", "127.0.0.1", "-p", str(port), tmp_path / "disk.img", seconds=10
        )
    assert done.returncode == FAILED
    assert done.stderr.splitlines() == [done.stderr.rstrip("\n")]
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(("mode", "options"), [(0o000, ["-r"]), (0o444, [])])
def test_an_image_that_may_not_be_opened_is_named(tmp_path: Path, mode: int, options: list[str]) -> None:
    tmp_path.chmod(0o755)
    image = tmp_path / "disk.img"
    random_disk(image, MIB)
    image.chmod(mode)
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = run(*unprivileged, NBDSERVE, "-f", "raw", *options, "-k", tmp_path / "nbd.sock", image, seconds=10)
    assert done.returncode == FAILED
    why = "cannot be opened for writing: Permission denied: serve it read-only (-r)"
    assert done.stderr == f"nbdserve: {image}: {'Permission denied' if options else why}\n"


@pytest.mark.parametrize("kind", ["qcow2", "qed", "vmdk", "vhdx", "vdi", "vpc", "parallels"])
def test_a_raw_image_that_looks_like_another_format_needs_an_explicit_format(
    tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "disk.img"
    check("qemu-img", "create", "-f", kind, image, "16M")
    done = run(NBDSERVE, "-k", tmp_path / "nbd.sock", image, seconds=10)
    assert done.returncode == FAILED
    assert done.stderr.splitlines() == [done.stderr.rstrip("\n")]
    assert f"{image}: " in done.stderr
    assert kind in done.stderr
    assert "-f raw" in done.stderr
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        check("nbdcopy", server.uri(), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


def test_a_guest_cannot_make_the_next_start_read_its_image_as_qcow2(tmp_path: Path) -> None:
    image, hidden = tmp_path / "disk.img", tmp_path / "hidden.qcow2"
    random_disk(image, 16 * MIB)
    (tmp_path / "secret").write_bytes(b"the host's secret" * 1000)
    check("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", hidden, "16M")
    with nbdserve(image, directory=tmp_path) as server:
        assert "served as raw" in server.process.output()
        header = tmp_path / "header"
        header.write_bytes(hidden.read_bytes())
        check("nbdcopy", header, server.uri())
    done = run(NBDSERVE, "-k", tmp_path / "nbd.sock", image, seconds=10)
    assert done.returncode == FAILED
    assert "qcow2" in done.stderr


def test_help_and_version_go_to_standard_output(tmp_path: Path) -> None:
    for options, text in ((["--help"], "--export NAME=FILE"), (["-h"], "-k"), (["--version"], "nbdserve 0.")):
        done = run(NBDSERVE, *options, seconds=10)
        assert done.returncode == 0
        assert text in done.stdout
        assert done.stderr == ""
