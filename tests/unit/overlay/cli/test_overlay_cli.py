"""What the operator types, and the one line that answers a mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overlay.cli import main as cli
from overlay.formats.image import Backing
from overlay.formats.open import Layout, open_image
from overlay.formats.qed.header import Feature, read_header
from overlay.formats.qed.image import QedImage
from overlay.formats.storage import open_file
from tests.support.qed import make_image, poke

MIB = 1 << 20
BACKING = ("--backing", "nbd://h/disk")
QED = ("--layout", "qed")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run nbd-overlay; its exit code, output and errors."""

    def run_with(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["nbd-overlay", *map(str, words)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_with


@pytest.mark.parametrize("place", ["/", ".", ""])
@pytest.mark.parametrize(
    "command",
    [
        ("discard",),
        ("create", "--force", *BACKING, "--size", "1M"),
        ("info",),
        ("check",),
        ("map",),
        ("verify",),
    ],
)
def test_a_directory_and_an_empty_path_are_refused_in_a_line(
    command: tuple[str, ...], place: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*command, place)
    assert (code, err.count("\n")) == (1 if place else 2, 1), err
    assert (f"nbd-overlay: {place}: " if place else "argument IMAGE: it is empty") in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--map", "--seed", "--pid-file"])
def test_an_option_for_a_file_that_a_script_left_empty_is_refused(option: str, run: Run) -> None:
    code, _, err = run("serve", "x", "-k", "x.sock", option, "")
    assert code == 2
    assert f"argument {option}: it is empty" in err


def test_create_makes_an_image_whose_backing_is_raw(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "create", *QED, "--backing", "nbd:h:99:exportname=a b", "--size", "1.5G", tmp_path / "x"
    )
    assert (code, err) == (0, "")
    assert "1.5 GiB (1610612736 bytes), backing nbd://h:99/a%20b" in out
    storage = open_file(tmp_path / "x")
    header, backing = read_header(storage, "x")
    storage.close()
    assert backing == Backing("nbd://h:99/a%20b", raw=True)
    assert (header.image_size, header.cluster_size, header.table_size) == (3 << 29, 65536, 4)


def test_the_path_of_a_socket_does_not_depend_on_where_create_ran(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("create", "--backing", "nbd:unix:a.sock", "--size", "1M", "x")
    assert (
        json.loads(run("info", "--json", "x")[1])["backing-filename"]
        == f"nbd+unix:///?socket={tmp_path}/a.sock"
    )


def test_an_existing_file_is_overwritten_only_by_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    code, _, err = run("create", *BACKING, "--size", "1M", tmp_path / "x")
    assert (code, err) == (1, f"nbd-overlay: {tmp_path}/x: the file exists; choose another name, or --force "
                              "to overwrite it\n")  # fmt: skip
    assert (tmp_path / "x").read_bytes() == b"precious"
    assert run("create", "--force", *BACKING, "--size", "1M", tmp_path / "x")[0] == 0
    assert run("check", tmp_path / "x")[0] == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: COMMAND"),
        (["bogus"], "invalid choice"),
        (["create", "x"], "required: --backing"),
        (["create", "--backing", "migrate:disk", "x"], "cannot be asked yet: give --size"),
        (["create", "--backing", "/a/file", "x"], "not an NBD address"),
        (["create", *BACKING, "--size", "1Q", "x"], "is not a size"),
        (["create", *BACKING, "--size", "0", "x"], "a disk of 0 bytes"),
        (["create", *QED, *BACKING, "--size", "0", "x"], "a disk of 0 bytes"),
        (["create", *BACKING, "--size", "2P", "x"], "to 1 PiB"),
        (
            ["create", *BACKING, "--size", "1G", "--cluster-size", "64K", "x"],
            "--cluster-size is for --layout qed",
        ),
        (["create", *QED, *BACKING, *BACKING, "--size", "1G", "x"], "--layout flat takes several"),
        (
            ["create", *8 * ("--backing", "nbd://h/" + "x" * 4000), "--size", "1G", "x"],
            "too many for the map",
        ),
        (["create", *QED, *BACKING, "--size", "65T", "x"], "to 64 TiB"),
        (["create", *QED, *BACKING, "--size", "1G", "--cluster-size", "100K", "x"], "power of two"),
        (["create", *QED, *BACKING, "--size", "1G", "--cluster-size", "64M", "x"], "no QEMU opens"),
        (["create", *BACKING, "--size", "1G", "--layout", "qcow2", "x"], "invalid choice"),
        (
            [
                "create",
                *QED,
                "--backing",
                "nbd://h/" + "x" * 4090,
                "--size",
                "1G",
                "--cluster-size",
                "4K",
                "x",
            ],
            "too many",
        ),
        (["check", "--repair", "-U", "x"], "exclude each other"),
        (["info"], "required: IMAGE"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_backing_that_cannot_be_asked_leaves_no_image(run: Run, tmp_path: Path) -> None:
    code, _, err = run("create", "--backing", "nbd://127.0.0.1:1/x", tmp_path / "x")
    assert code == 1
    assert "nbd://127.0.0.1:1/x" in err
    assert "Connection refused" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    code, _, err = run("create", *BACKING, "--size", "1M", tmp_path / "no" / "x")
    assert (code, err) == (1, f"nbd-overlay: {tmp_path}/no/x: no such file or directory; check the path\n")


def test_a_full_disk_leaves_no_image(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> None:
        if size:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    code, _, err = run("create", *BACKING, "--size", "1M", tmp_path / "x")
    assert (code, err) == (1, f"nbd-overlay: {tmp_path}/x: No space left on device\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_discard_removes_what_create_has_made(run: Run, tmp_path: Path, layout: str) -> None:
    image = tmp_path / "x"
    assert run("create", "--layout", layout, *BACKING, "--size", "1M", image)[0] == 0
    assert run("discard", image) == (0, f"{image} was empty, and is removed\n", "")
    assert list(tmp_path.iterdir()) == []
    assert run("discard", image) == (0, "", ""), "there is nothing left to do"


@pytest.mark.parametrize("layout", ["flat", "qed"])
@pytest.mark.parametrize("content", ["written", "copied", "zeroed"])
def test_discard_keeps_what_is_not_empty(run: Run, tmp_path: Path, layout: Layout, content: str) -> None:
    image = tmp_path / "x"
    assert run("create", "--layout", layout, *BACKING, "--size", "1M", image)[0] == 0
    with open_image(image, writable=True, layout=layout) as opened:
        if content == "written":
            assert opened.write(0, b"x" * opened.cluster_size)
        elif content == "copied":
            assert opened.fill(0, b"x" * opened.cluster_size)
        else:
            assert opened.zero(0, opened.cluster_size)
    before = sorted(tmp_path.iterdir())
    code, out, err = run("discard", image)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "it is no empty overlay" in err
    assert sorted(tmp_path.iterdir()) == before


def test_discard_can_take_what_was_copied_for_nothing(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "x"
    assert run("create", *BACKING, "--size", "1M", image)[0] == 0
    with open_image(image, writable=True) as opened:
        assert opened.fill(0, b"x" * opened.cluster_size)
    told = json.loads(run("info", "--json", image)[1])
    assert (told["local-size"], told["written-size"]) == (4096, 0)
    assert "written by the guest: 0 B" in run("info", image)[1]
    assert run("discard", "--copies", image) == (0, f"{image} held nothing but copies, and is removed\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["flat", "qed"])
@pytest.mark.parametrize("content", ["written", "zeroed", "complete"])
def test_discard_keeps_what_a_guest_has_written(
    run: Run, tmp_path: Path, layout: Layout, content: str
) -> None:
    image = tmp_path / "x"
    assert run("create", "--layout", layout, *BACKING, "--size", "1M", image)[0] == 0
    with open_image(image, writable=True, layout=layout) as opened:
        size = opened.size if content == "complete" else opened.cluster_size
        if content == "zeroed":
            assert opened.zero(0, size)
        else:
            assert opened.fill(0, b"x" * size)
        if content == "written":
            assert opened.write(0, b"y" * size)
        elif content == "complete":
            opened.finish()
    code, out, err = run("discard", "--copies", image)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "it is no overlay without a guest's writes" in err
    assert image.exists()


@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_discard_keeps_what_is_in_use(run: Run, tmp_path: Path, layout: Layout) -> None:
    image = tmp_path / "x"
    assert run("create", "--layout", layout, *BACKING, "--size", "1M", image)[0] == 0
    with open_image(image, layout=layout):
        code, _, err = run("discard", image)
    assert (code, err.count("\n")) == (1, 1)
    assert image.exists()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_discard_removes_what_a_creation_that_was_killed_has_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, number: int
) -> None:
    """Killed at its ``number``-th system call that changes a file, as far as there are so many."""
    image, calls = tmp_path / "x", 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls > number:
                os._exit(9)
            return call(*arguments)

        return counting

    if not os.fork():
        for name in ("ftruncate", "pwrite", "fdatasync", "fsync", "unlink"):
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        run("create", "--layout", layout, *BACKING, "--size", "1M", image)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, "there are so many"
    assert image.exists()
    assert run("discard", image)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_discard_keeps_any_other_file(run: Run, tmp_path: Path) -> None:
    for name, content in {"raw": b"x" * 4096, "text": b"mine\n", "zeros": bytes(4096)}.items():
        (tmp_path / name).write_bytes(content)
        assert run("discard", tmp_path / name)[0] == 1
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("command", ["info", "check", "map"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), (b"", "neither an overlay image"), (b"x" * 700, "neither an overlay image"),
     (b"QFI\xfb" + bytes(600), "looks like a qcow2 image"),
     (b"QED\0" + bytes(30), "ends within the header"), (b"QED\0" + bytes(600), "cluster size")],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_one_line(
    run: Run, tmp_path: Path, command: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    code, out, err = run(command, tmp_path / "x")
    assert (code, out) == (1, "")
    assert err.startswith(f"nbd-overlay: {tmp_path}/x: ")
    assert complaint in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("magic", [b"QED\0", b"LUKS\xba\xbe\0\2", b"QFI\xfb\0\0\0\3", b"KDMV"])
@pytest.mark.parametrize("command", ["info", "check", "map"])
def test_a_complete_disk_is_one_whatever_its_guest_keeps_at_its_beginning(
    run: Run, tmp_path: Path, command: str, magic: bytes
) -> None:
    (tmp_path / "x").write_bytes(magic + bytes(8192 - len(magic)))
    assert run(command, tmp_path / "x")[0] == 1
    code, out, err = run(command, "--layout", "flat", tmp_path / "x")
    assert (code, err) == (0, "")
    assert out
    code, out, err = run(command, "--layout", "flat", "--json", tmp_path / "x")
    assert (code, err) == (0, "")
    told = json.loads(out)
    if command == "info":
        assert (told["format"], told["virtual-size"], told["local-size"]) == ("raw", 8192, 8192)


@pytest.mark.parametrize("command", ["info", "check", "map"])
def test_a_layout_that_an_image_does_not_have_is_refused(run: Run, tmp_path: Path, command: str) -> None:
    assert run("create", *BACKING, "--size", "1M", tmp_path / "x")[0] == 0
    code, out, err = run(command, "--layout", "qed", tmp_path / "x")
    assert (code, out, len(err.splitlines())) == (1, "", 1)


def test_info_shows_what_the_header_says(run: Run, tmp_path: Path) -> None:
    make_image(tmp_path / "x", MIB, backing="nbd://h/a\x1b[31m\n")
    out = run("info", tmp_path / "x")[1]
    assert "disk: 1 MiB (1048576 bytes)" in out
    assert r"backing: nbd://h/a\x1b[31m\n (raw)" in out
    poke(tmp_path / "x", 16, Feature.NEED_CHECK)
    out = run("info", tmp_path / "x")[1]
    assert "backing: none" in out
    assert f"not closed cleanly: run nbd-overlay check --repair {tmp_path}/x" in out


def test_info_tells_how_much_of_a_qed_image_is_here(run: Run, tmp_path: Path) -> None:
    make_image(tmp_path / "x", MIB, backing="nbd://h/a")
    assert json.loads(run("info", "--json", tmp_path / "x")[1])["local-size"] == 0
    with QedImage.open(tmp_path / "x", writable=True) as image:
        image.write(0, b"x" * 131072)
    assert json.loads(run("info", "--json", tmp_path / "x")[1])["local-size"] == 131072
    assert "local: 128 KiB (12%)" in run("info", tmp_path / "x")[1]


def test_a_name_that_is_not_utf8_does_no_harm(run: Run, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    assert run("create", *BACKING, "--size", "1M", path)[0] == 0
    for command in ("info", "check", "map"):
        assert run(command, path)[0] == 0


def test_map_shows_what_is_here_and_what_is_not(run: Run, tmp_path: Path) -> None:
    make_image(tmp_path / "x", MIB, backing="nbd://h/")
    with QedImage.open(tmp_path / "x", writable=True) as image:
        image.write(65536, b"x" * 131072)
        image.zero(524288, 65536)
    lines = [line.split() for line in run("map", tmp_path / "x")[1].splitlines()]
    assert lines == [
        ["offset", "length", "state", "file", "offset"],
        ["0x0", "0x10000", "absent"],
        ["0x10000", "0x20000", "data", "0x50000"],
        ["0x30000", "0x50000", "absent"],
        ["0x80000", "0x10000", "zero"],
        ["0x90000", "0x70000", "absent"],
    ]


def test_leaks_are_told_and_are_no_failure_but_corruptions_are(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x"
    make_image(path, MIB, backing="nbd://h/")
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 65536)
    code, out, _ = run("check", path)
    assert code == 0
    assert "1 leaked clusters: wasted space, no harm to data" in out
    poke(path, 65536 + 8, 1)
    code, out, _ = run("check", path)
    assert code == 1
    assert f"{path}: entry 1 of the L1 table, 0x1, is not the place of an L2 table" in out
    assert "1 corruptions: do not use the image" in out
    code, out, _ = run("check", "--repair", path)
    assert code == 0
    assert "repaired: 1 references cleared, 1 leaks cut off" in out
    assert run("check", path)[1].startswith("no corruption found")
