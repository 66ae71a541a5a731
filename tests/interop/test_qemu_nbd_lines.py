"""An operator's qemu-nbd command lines, run with qemu-nbd and with nbdserve in its place."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_bytes, sparse_disk, sparse_runs
from tests.support.processes import Argument, Process, check, is_alive, listens, run, wait_until
from tests.support.servers import NBDSERVE, TcpAddress, UnixAddress, free_tcp_address, qemu_nbd
from tests.support.wire import Wire

SIZE = 4 * MIB
PROGRAMS = {"qemu-nbd": Path("qemu-nbd"), "nbdserve": NBDSERVE}
# What is told of an export that an operator would miss. qemu-nbd allows connections to be shared (multi-conn)
# in fewer cases, and no request of more than 32 MiB.
TOLD = (
    "export-name", "description", "export-size", "is_read_only", "is_rotational", "can_flush", "can_fua",
    "can_df", "can_trim", "can_zero", "can_fast_zero", "can_cache", "block_size_preferred",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What clients see of a server, and what is in the image afterwards."""

    export: dict[str, object]
    minimum_block: int
    contexts: list[str]
    content: bytes
    map: str
    after: bytes


def prepare(directory: Path, kind: str) -> Path:
    """The image of a test: some data, some holes."""
    raw = directory / "disk.raw"
    sparse_disk(raw, sparse_runs(SIZE))
    if kind == "raw":
        return raw
    image = directory / f"disk.{kind}"
    check("qemu-img", "convert", "-f", "raw", "-O", kind, raw, image)
    return image


def raw_content(image: Path, kind: str, directory: Path) -> bytes:
    """What a guest would read of an image."""
    copy = directory / "content.raw"
    check("qemu-img", "convert", "-f", kind, "-O", "raw", image, copy)
    return copy.read_bytes()


def look(uri: str, image: Path, kind: str, directory: Path) -> Seen:
    """Look at an export with stock clients, and write to it if it lets us."""
    told = json.loads(check("nbdinfo", "--json", uri))["exports"][0]
    check("nbdcopy", uri, directory / "copy.raw")
    mapped = check("nbdinfo", "--map", uri)
    if not told["is_read_only"]:
        data = directory / "data.raw"
        data.write_bytes(random_bytes(MIB, seed=7))
        write = [
            f"write -s {data} 512k 1M",
            "write -z 2M 64k",
            "write -P 0 2560k 128k",
            "discard 1M 64k",
            "flush",
        ]
        # A discard may leave what it likes.
        write += ["write -P 7 1M 64k"]
        check("qemu-io", "-f", "raw", *[word for command in write for word in ("-c", command)], uri)
    return Seen(
        export={key: told.get(key) for key in TOLD},
        minimum_block=told["block_size_minimum"],
        contexts=told["contexts"],
        content=(directory / "copy.raw").read_bytes(),
        map=mapped,
        after=b"" if kind != "raw" else image.read_bytes(),
    )


# The kind of image, the options, and the name of the export.
LINES: list[tuple[str, str, str]] = [
    ("raw", "-t -f raw -k {socket} {image}", ""),
    ("raw", "--persistent --format=raw --socket={socket} {image}", ""),
    ("raw", "-t -f raw -p {port} -b 127.0.0.1 {image}", ""),
    ("raw", "-t -f raw --port {port} --bind=127.0.0.1 {image}", ""),
    ("raw", "-t -r -f raw -k {socket} {image}", ""),
    ("raw", "-t --read-only -f raw -k {socket} {image}", ""),
    ("raw", "-t -f raw -e 4 -k {socket} {image}", ""),
    ("raw", "-t -f raw --shared=0 -k {socket} {image}", ""),
    ("raw", "-t -f raw -x disk -k {socket} {image}", "disk"),
    ("raw", "-t -f raw --export-name=disk -D 'The disk' -k {socket} {image}", "disk"),
    ("raw", "-t -f raw --description=Disk -k {socket} {image}", ""),
    ("raw", "-t -f raw -o 1048576 -k {socket} {image}", ""),
    ("raw", "-t -f raw --offset=4096 -r -k {socket} {image}", ""),
    ("raw", "-t -v -f raw -k {socket} {image}", ""),
    ("raw", "-t -A -f raw -k {socket} {image}", ""),
    ("raw", "-t -f raw --discard=unmap -k {socket} {image}", ""),
    ("raw", "-t -f raw --discard=ignore -k {socket} {image}", ""),
    ("raw", "-t -f raw --detect-zeroes=on -k {socket} {image}", ""),
    ("raw", "-t -f raw --discard=unmap --detect-zeroes=unmap -k {socket} {image}", ""),
    ("raw", "-t -f raw --cache=none -k {socket} {image}", ""),
    ("raw", "-t -f raw --cache=writeback -k {socket} {image}", ""),
    ("raw", "-t -f raw --cache=writethrough -k {socket} {image}", ""),
    ("raw", "-t -f raw --cache=directsync -k {socket} {image}", ""),
    ("raw", "-t -f raw --cache=unsafe -k {socket} {image}", ""),
    ("raw", "-t -f raw -n --aio=native -k {socket} {image}", ""),
    ("raw", "-t -f raw --nocache --aio=threads -k {socket} {image}", ""),
    ("qcow2", "-t -f qcow2 -k {socket} {image}", ""),
    ("qcow2", "-t -r -f qcow2 -x disk -k {socket} {image}", "disk"),
    (
        "qcow2",
        "-t -f qcow2 --cache=none --aio=native --discard=unmap --detect-zeroes=unmap -k {socket} {image}",
        "",
    ),
    ("qed", "-t -f qed -k {socket} {image}", ""),
    ("vmdk", "-t -r -f vmdk -k {socket} {image}", ""),
]


def words(line: str, directory: Path, image: Path, port: int) -> list[str]:
    """The arguments of a line. Only its description has a space in it."""
    text = line.replace("'The disk'", "The_disk")
    places = {"socket": directory / "nbd.sock", "image": image, "port": port, "pid": directory / "nbd.pid"}
    return [word.format(**places).replace("The_disk", "The disk") for word in text.split()]


@contextmanager
def served(
    program: str, line: str, directory: Path, image: Path
) -> Iterator[tuple[UnixAddress | TcpAddress, Process]]:
    """A program with a line, when it lets clients in."""
    tcp = free_tcp_address()
    address: UnixAddress | TcpAddress = UnixAddress(directory / "nbd.sock") if "{socket}" in line else tcp
    command: list[Argument] = [PROGRAMS[program], *words(line, directory, image, tcp.port)]
    with Process(command, directory / f"{program}.log") as process:
        process.wait_for(lambda: _accepts(address, directory), "clients are let in")
        yield address, process


def _accepts(address: UnixAddress | TcpAddress, directory: Path) -> bool:
    """Whether somebody listens there, found out without connecting, which could end a server."""
    if isinstance(address, UnixAddress):
        return listens(address.path)
    wanted = f":{address.port:04X} 00000000:0000 0A"
    return wanted in Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()


@pytest.mark.parametrize(("kind", "line", "export"), LINES, ids=[line for _, line, _ in LINES])
@pytest.mark.sampled(10)
def test_a_line_serves_the_same_with_both(tmp_path: Path, kind: str, line: str, export: str) -> None:
    seen = {}
    for program in PROGRAMS:
        directory = tmp_path / program
        directory.mkdir()
        image = prepare(directory, kind)
        with served(program, line, directory, image) as (address, process):
            seen[program] = look(address.uri(export), image, kind, directory)
            assert process.running, "it was to go on after its clients"
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
        if kind != "raw":
            content = raw_content(image, kind, directory)
            seen[program] = Seen(**{**vars(seen[program]), "after": content})
    ours, theirs = seen["nbdserve"], seen["qemu-nbd"]
    assert ours.export == theirs.export
    assert ours.minimum_block <= theirs.minimum_block
    assert set(ours.contexts) >= set(theirs.contexts)
    assert ours.content == theirs.content
    assert ours.map == theirs.map
    assert ours.after == theirs.after


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_line_with_fork_returns_when_clients_are_let_in(tmp_path: Path, program: str) -> None:
    image = prepare(tmp_path, "raw")
    line = "--fork --pid-file={pid} -t -f raw -k {socket} {image}"
    check(PROGRAMS[program], *words(line, tmp_path, image, 0))
    pid = int((tmp_path / "nbd.pid").read_text())
    try:
        assert check("nbdinfo", "--size", UnixAddress(tmp_path / "nbd.sock").uri()) == f"{SIZE}\n"
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the daemon has ended")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_pid_file_of_a_line_without_fork_names_the_program(tmp_path: Path, program: str) -> None:
    image = prepare(tmp_path, "raw")
    line = "--pid-file={pid} -t -f raw -k {socket} {image}"
    with served(program, line, tmp_path, image) as (_, process):
        process.wait_for_pid_file(tmp_path / "nbd.pid")
        assert int((tmp_path / "nbd.pid").read_text()) == process.pid


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_more_clients_than_shared_allows_are_served_at_a_time(tmp_path: Path, program: str) -> None:
    image = prepare(tmp_path, "raw")
    with (
        served(program, "-t -f raw -e 2 -k {socket} {image}", tmp_path, image) as (address, _),
        Wire(address) as first,
        Wire(address) as second,
        Wire(address, 0.3) as third,
    ):
        first.go()
        second.go()
        with pytest.raises(TimeoutError):
            third.receive(1)


# What both refuse, and the format in which a qemu-nbd holds the image meanwhile, if one does.
REFUSED: list[tuple[str, str | None]] = [
    ("-f raw -k {socket} {image}.missing", None),
    ("-f qcow2 -k {socket} {image}", None),
    ("-f nonsense -k {socket} {image}", None),
    ("-f raw -o 1099511627776 -k {socket} {image}", None),
    ("-f raw --cache=sometimes -k {socket} {image}", None),
    ("-f raw --detect-zeroes=unmap --discard=ignore -k {socket} {image}", None),
    ("-f raw -k {socket} {image} {image}", None),
    ("-f raw", None),
    ("-f qcow2 -k {socket} {image}", "qcow2"),
    ("-r -f qcow2 -k {socket} {image}", "qcow2"),
    ("-f raw -k {socket} {image}", "qcow2"),
]


@pytest.mark.parametrize(("line", "held"), REFUSED, ids=[f"{line}, held as {held}" for line, held in REFUSED])
def test_what_qemu_nbd_refuses_is_refused(tmp_path: Path, line: str, held: str | None) -> None:
    image = prepare(tmp_path, held or "raw")
    holder: AbstractContextManager[object] = (
        nullcontext() if held is None else qemu_nbd("-f", held, image, directory=tmp_path)
    )
    with holder:
        codes = {
            program: run(path, *words(line, tmp_path, image, 0), seconds=10).returncode
            for program, path in PROGRAMS.items()
        }
    assert codes["qemu-nbd"] != 0
    assert codes["nbdserve"] in (1, 2)


@pytest.mark.parametrize("option", ["-V", "--version", "-h", "--help"])
def test_help_and_version_are_told_by_both(option: str) -> None:
    for program in PROGRAMS.values():
        done = run(program, option, seconds=10)
        assert done.returncode == 0
        assert done.stdout
        assert not done.stderr
