"""Images that qemu-img and QEMU made: the same map and the same data here, and the same verdict on damage."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlay.formats.image import Backing, State
from overlay.formats.qed.image import QedImage
from tests.support.disks import MIB, random_disk, sparse_disk, sparse_runs
from tests.support.holding import qemu_holding
from tests.support.processes import check, dying_with_parent, run
from tests.support.qed import make_image, poke, qemu_io, read_u64

NBD_OVERLAY = Path(sys.executable).with_name("nbd-overlay")
GIB = 1 << 30
CLUSTER = 65536
L1 = CLUSTER


def made(path: Path, size: int | str, *options: str) -> Path:
    check("qemu-img", "create", "-q", "-f", "qed", *options, path, str(size))
    return path


def answer(*argv: str | Path) -> Any:
    return json.loads(check(*argv))


def assert_same_map(image: Path) -> None:
    ours = answer(NBD_OVERLAY, "map", "--json", image)
    theirs = answer("qemu-img", "map", "--output=json", image)
    for extent in theirs:
        # Told since QEMU 8.2; QED has no compression.
        assert not extent.pop("compressed", False)
    assert ours == theirs


def dump(image: Path, directory: Path) -> bytes:
    """The disk as QEMU reads it, without its backing."""
    node = {"driver": "qed", "backing": None, "file": {"driver": "file", "filename": str(image)}}
    check("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", directory / "dump")
    return (directory / "dump").read_bytes()


@pytest.mark.parametrize("size", [0, 512, 1000, CLUSTER, CLUSTER + 512, "1T"])
def test_an_empty_image_of_qemu_img_is_read(tmp_path: Path, size: int | str) -> None:
    image = made(tmp_path / "x.qed", size)
    theirs = answer("qemu-img", "info", "--output=json", image)
    ours = answer(NBD_OVERLAY, "info", "--json", image)
    for key in ("virtual-size", "cluster-size", "format", "dirty-flag", "filename", "actual-size"):
        assert ours[key] == theirs[key], key
    if size:  # of no disk at all, qemu-img maps one run of no bytes
        assert_same_map(image)


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k,table_size=2", "cluster_size=1M"])
def test_a_converted_disk_is_read_as_qemu_reads_it(tmp_path: Path, options: str) -> None:
    content = sparse_disk(tmp_path / "disk", sparse_runs(9 * MIB + 1024))
    check(
        "qemu-img", "convert", "-f", "raw", "-O", "qed", "-o", options, tmp_path / "disk", tmp_path / "x.qed"
    )
    with QedImage.open(tmp_path / "x.qed") as image:
        assert image.read(0, image.size) == content
    assert_same_map(tmp_path / "x.qed")


def test_writes_zeros_and_a_partial_last_cluster_of_qemu_are_read(tmp_path: Path) -> None:
    image = made(tmp_path / "x.qed", 4 * MIB + 512 * 3)
    qemu_io(
        image,
        "write -P 1 0 1",
        "write -P 2 65000 2000",
        "write -z 1M 128k",
        "write -P 3 1100000 512",
        "write -P 4 2M 64k",
        "write -z 2M 64k",
        "write -z 3000000 100000",
        f"write -P 5 {4 * MIB + 1000} 536",
    )
    assert_same_map(image)
    with QedImage.open(image) as opened:
        assert opened.read(0, opened.size) == dump(image, tmp_path)
        assert State.ZERO in {run.state for run in opened.runs(0, opened.size)}


def test_a_backing_file_is_named_and_its_clusters_are_absent(tmp_path: Path) -> None:
    random_disk(tmp_path / "base.raw", 2 * MIB)
    image = made(tmp_path / "x.qed", 2 * MIB, "-b", str(tmp_path / "base.raw"), "-F", "raw")
    qemu_io(image, "write -P 1 64k 64k", "write -z 1M 64k", "write -P 2 300000 512")
    with QedImage.open(image) as opened:
        assert opened.backings == (Backing(str(tmp_path / "base.raw"), raw=True),)
    assert_same_map(image)
    check("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "2M")
    probed = made(tmp_path / "y.qed", 2 * MIB, "-b", str(tmp_path / "base.qcow2"), "-F", "qcow2")
    with QedImage.open(probed) as opened:
        assert opened.backings == (Backing(str(tmp_path / "base.qcow2"), raw=False),)


@pytest.mark.parametrize("seed", range(3))
def test_any_history_of_writes_by_qemu_is_read_the_same(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    size = 20 * MIB + 512 * seed
    image = made(tmp_path / "x.qed", size, "-o", f"cluster_size={chance.choice([4096, 65536])},table_size=2")
    commands = []
    for number in range(60):
        offset = chance.randrange(size // 512) * 512
        length = min(chance.choice([512, 5120, CLUSTER, 3 * CLUSTER, MIB]), size - offset)
        commands.append(f"write {chance.choice(['-z', f'-P {number + 1}'])} {offset} {length}")
    qemu_io(image, *commands)
    assert_same_map(image)
    with QedImage.open(image) as opened:
        assert opened.read(0, size) == dump(image, tmp_path)


def test_an_image_whose_qemu_was_killed_is_taken_over_after_a_check(tmp_path: Path) -> None:
    image = made(tmp_path / "x.qed", MIB)
    argv = ["qemu-io", "-f", "qed", "-c", "write -P 1 0 64k", "-c", "sigraise 9", str(image)]
    subprocess.run([*dying_with_parent(signal.SIGKILL), *argv], timeout=240, capture_output=True, check=False)
    assert answer(NBD_OVERLAY, "info", "--json", image)["dirty-flag"]
    with QedImage.open(image, writable=True) as opened:
        assert opened.read(0, 65536) == b"\x01" * 65536
        opened.write(65536, b"\x02" * 100)
    assert not answer(NBD_OVERLAY, "info", "--json", image)["dirty-flag"]
    qemu_io(image, "read -P 1 0 64k", "read -P 2 64k 100")
    check("qemu-img", "check", image)


@pytest.mark.parametrize("command", ["info", "check", "map"])
def test_an_image_that_qemu_writes_to_is_read_only_by_force_as_with_qemu_img(
    tmp_path: Path, command: str
) -> None:
    image = made(tmp_path / "x.qed", MIB)
    with qemu_holding(image):
        refused = run(NBD_OVERLAY, command, image)
        assert refused.returncode == 1
        assert run("qemu-img", command, image).returncode == 1
        assert "in use: another process is writing to it" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        check(NBD_OVERLAY, command, "-U", image)
        check("qemu-img", command, "-U", image)
    check(NBD_OVERLAY, command, image)


@pytest.mark.parametrize("options", [(), ("-r",)])
def test_an_image_in_use_is_neither_repaired_nor_overwritten(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    image = made(tmp_path / "x.qed", MIB)
    poke(image, 16, 2)
    before = image.read_bytes()
    create = (
        NBD_OVERLAY,
        "create",
        "--layout",
        "qed",
        "--force",
        "--backing",
        "nbd://h/",
        "--size",
        "1M",
        image,
    )
    with qemu_holding(image, *options):
        held = image.read_bytes()
        for command in ((NBD_OVERLAY, "check", "--repair", image), create):
            refused = run(*command)
            assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
            assert "in use" in refused.stderr
        assert image.read_bytes() == held
    if options:
        assert image.read_bytes() == before


def test_readers_of_an_image_do_not_disturb_one_another(tmp_path: Path) -> None:
    image = made(tmp_path / "x.qed", MIB)
    with qemu_holding(image, "-r"):
        for command in ("info", "check", "map"):
            check(NBD_OVERLAY, command, image)


def first_l2(image: Path) -> int:
    return read_u64(image, L1)


def leak(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size + 2 * CLUSTER)


def lose_cluster(image: Path) -> None:
    poke(image, first_l2(image), 0)


def lose_table(image: Path) -> None:
    poke(image, L1, 0)


def share_cluster(image: Path) -> None:
    poke(image, first_l2(image) + 8 * 5, read_u64(image, first_l2(image)))


def data_behind_end(image: Path) -> None:
    poke(image, first_l2(image) + 8, 1 << 40)


def data_misaligned(image: Path) -> None:
    poke(image, first_l2(image) + 8, read_u64(image, first_l2(image)) + 512)


def data_on_header(image: Path) -> None:
    poke(image, first_l2(image) + 8, 2)


def data_on_l1(image: Path) -> None:
    poke(image, first_l2(image) + 8, L1 + CLUSTER)


def data_on_l2(image: Path) -> None:
    poke(image, first_l2(image) + 8, first_l2(image))


def table_behind_end(image: Path) -> None:
    poke(image, L1 + 8 * 7, 1 << 41)


def table_half_behind_end(image: Path) -> None:
    poke(image, L1 + 8 * 7, image.stat().st_size - CLUSTER)


def table_misaligned(image: Path) -> None:
    poke(image, L1 + 8 * 7, first_l2(image) + 1)


def table_shared(image: Path) -> None:
    poke(image, L1 + 8 * 7, first_l2(image))


def table_overlapping(image: Path) -> None:
    poke(image, L1 + 8 * 7, first_l2(image) + CLUSTER)


def table_on_l1(image: Path) -> None:
    poke(image, L1 + 8 * 7, L1)


def cut_off(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - CLUSTER)


DAMAGES = [
    leak,
    lose_cluster,
    lose_table,
    share_cluster,
    data_behind_end,
    data_misaligned,
    data_on_header,
    data_on_l1,
    data_on_l2,
    table_behind_end,
    table_half_behind_end,
    table_misaligned,
    table_shared,
    table_overlapping,
    table_on_l1,
    cut_off,
]


def counts(report: dict[str, Any]) -> dict[str, int]:
    keys = ("corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters")
    return {key: report.get(key, 0) for key in keys}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.sampled(5)
def test_both_checks_count_the_same_damage(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    image = made(tmp_path / "x.qed", 40 * GIB)
    qemu_io(image, "write -P 1 0 64k", "write -P 2 256k 128k", "write -P 3 30G 64k", "write -z 1M 64k")
    damage(image)
    theirs = run("qemu-img", "check", "--output=json", image)
    ours = run(NBD_OVERLAY, "check", "--json", image)
    assert counts(json.loads(ours.stdout)) == counts(json.loads(theirs.stdout))
    assert theirs.returncode in (2, 3), "QEMU sees the damage"
    assert ours.returncode == (1 if theirs.returncode == 2 else 0)
    assert len(json.loads(ours.stdout)["problems"]) == (ours.returncode == 1)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.sampled(5)
def test_what_our_repair_leaves_satisfies_qemu_or_is_still_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    image = made(tmp_path / "x.qed", 40 * GIB)
    qemu_io(image, "write -P 1 0 64k", "write -P 2 256k 128k", "write -P 3 30G 64k")
    damage(image)
    repaired = run(NBD_OVERLAY, "check", "--repair", "--json", image)
    ours = json.loads(repaired.stdout)
    theirs = run("qemu-img", "check", "--output=json", image)
    assert counts(json.loads(theirs.stdout))["corruptions"] == ours["corruptions"]
    assert counts(json.loads(theirs.stdout))["leaks"] == ours["leaks"]
    unrepairable = {share_cluster, data_on_l1, data_on_l2, table_shared, table_overlapping, table_on_l1}
    assert repaired.returncode == (damage in unrepairable)
    again = run(NBD_OVERLAY, "check", "--json", image)
    assert again.returncode == repaired.returncode


def test_a_damaged_image_is_refused_in_one_line_where_the_damage_is_met(tmp_path: Path) -> None:
    image = tmp_path / "x.qed"
    make_image(image, GIB)
    qemu_io(image, "write -P 1 0 64k")
    data_behind_end(image)
    refused = run(NBD_OVERLAY, "map", image)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "is not the place of a cluster" in refused.stderr


def test_a_missing_image_with_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    for command in ("info", "check", "map"):
        refused = run(NBD_OVERLAY, command, os.fsdecode(os.fsencode(tmp_path) + b"/x\xff\n"))
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)


def test_an_answer_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    image = made(tmp_path / "x.qed", MIB)
    for command in ("info", "check", "map"):
        refused = run("sh", "-c", f'"$0" {command} "$1" >/dev/full', NBD_OVERLAY, image)
        assert (refused.returncode, refused.stderr) == (
            1,
            "nbd-overlay: standard output: No space left on device\n",
        )


def test_a_reader_that_goes_away_ends_the_map_quietly(tmp_path: Path) -> None:
    image = made(tmp_path / "x.qed", GIB, "-o", "cluster_size=4k")
    with QedImage.open(image, writable=True) as opened:
        for offset in range(0, 24 * MIB, 8192):
            opened.write(offset, b"x")
    done = run("bash", "-c", '"$0" map "$1" | head -n 1', NBD_OVERLAY, image)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
