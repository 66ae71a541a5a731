"""``nbd-migrate demo``: it ends well only when the disk did arrive, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recipes.commands.run import migrate
from recipes.demo import run as demo
from recipes.demo.guest import Memory
from recipes.demo.records import extents, place
from recipes.demo.stage import Stage
from recipes.demo.verdict import Phases, Verdict
from recipes.hosts.host import Host
from recipes.migrate.progress import Report
from recipes.plans.limits import Limits
from recipes.processes.children import Children
from recipes.processes.supervisor import GRACE
from tests.support.guests import MIB, flip, short_directory, staged
from tests.support.processes import Process, check, run, wait_until

NBD_MIGRATE = Path(sys.executable).with_name("nbd-migrate")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its directories; it must remove them."""
    with short_directory() as directory:
        monkeypatch.setenv("TMPDIR", str(directory))
        yield directory


@pytest.mark.parametrize("options", [(), ("--engine", "qemu")], ids=["overlay", "qemu"])
@pytest.mark.representative
def test_the_demo_migrates_a_guest_and_leaves_nothing_behind(
    temporary: Path, options: tuple[str, ...]
) -> None:
    small = ("--size", "64M", "--speed", "32M", "--seconds", "1")
    done = run(NBD_MIGRATE, "demo", *small, *options, seconds=110)
    if options and "B's QEMU was ended by signal 6" in done.stderr:
        pytest.skip("QEMU's own QED has aborted, as 7.2 does now and then when a write waits for its source")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in range(1, 7):
        assert f"step {step}  " in done.stdout
    assert "0 wrong" in done.stdout
    assert done.stdout.endswith("verdict  the disk is complete and correct\n")
    assert done.stderr == ""
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_takes_everything_with_it(
    temporary: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A script's shell starts what it runs in the background with SIGINT ignored."""
    ignoring: list[str | Path] = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    argv: list[str | Path] = [
        *ignoring,
        NBD_MIGRATE,
        "demo",
        "--size",
        "32M",
        "--speed",
        "4M",
        "--seconds",
        "0",
    ]
    with Process(argv, tmp_path / "demo.log") as process:
        process.wait_for_line(" left  window", seconds=60)
        process.signal(number)
        assert process.wait(20) == (-number if number == signal.SIGKILL else 130)
    # A QEMU whose overlay ends first hangs, and is killed when its supervisor's patience is over.
    wait_until(lambda: not users(temporary), "all processes have ended", GRACE + 5)
    wait_until(lambda: not list(temporary.iterdir()), "the directory is removed")


def users(directory: Path) -> list[int]:
    """The processes with a path in the directory on their command lines."""
    found = ((process.pid, process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in found if any(str(directory) in word for word in words or ())]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "1000000"], "a disk of 1000000 bytes does not suit the guest"),
        (["--size", "many"], "'many' is not a size"),
        (["--seconds", "-1"], "not a number of seconds"),
        (["--keep", "/etc"], "--keep /etc: name an empty directory"),
    ],
)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_bad_usage_is_one_line(temporary: Path, arguments: list[str], complaint: str) -> None:
    done = run(NBD_MIGRATE, "demo", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.representative
def test_too_little_space_is_one_line_before_anything_is_written(temporary: Path) -> None:
    done = run(NBD_MIGRATE, "demo", "--size", "512T")
    assert done.returncode == 1
    assert "MiB are free, the demo needs 1073742080" in done.stderr
    assert done.stderr.count("\n") == 1


def where_it_lies(stage: Stage, offset: int) -> int:
    """Where in B's image a byte of the guest's disk lies, as qemu-img sees it; QEMU may have it open."""
    layout, image = stage.layout, stage.overlay
    for extent in json.loads(check("qemu-img", "map", "-U", "-f", layout, "--output=json", image)):
        distance = offset - int(extent["start"])
        if 0 <= distance < int(extent["length"]):
            return int(extent["offset"]) + distance
    raise AssertionError(f"{offset} lies nowhere")


@pytest.mark.parametrize("engine", ["overlay", "qemu"])
@pytest.mark.sampled(1)
def test_a_byte_changed_in_the_copy_makes_the_verdict_fail(tmp_path: Path, engine: str) -> None:
    with staged(tmp_path, 64 * MIB, engine) as stage:
        tampered, memory, phases = asyncio.run(migrate_and_tamper(stage))
        assert tampered.bad == 1
        assert memory.bad == 0

        def verdict(memory: Memory) -> Verdict:
            return demo.judge(stage, demo.Evidence(memory, phases, tuple(stage.leftovers())))

        good = verdict(memory)
        assert good.holds, list(good.lines())
        assert not verdict(tampered).holds
        end = sum(next(extents(memory.written, stage.cells)))
        flip(stage.overlay, where_it_lies(stage, end + 4096))
        bad = verdict(memory)
        assert (bad.comparison.different, bad.comparison.first) == (1, end + 4096)
        assert not bad.holds


async def migrate_and_tamper(stage: Stage) -> tuple[Memory, Memory, Phases]:
    """What the guest on B finds with a bit of one of its records changed, and when it is changed back."""
    guest = stage.guest_on_b
    async with Children() as children:
        a = await children.start("A's QEMU", Host("A"), stage.directory / "a.log", stage.source_qemu)
        await demo.boot(stage.guest_on_a, a)
        witness = demo.Witness(stage, Report())
        plan = stage.plan(Limits(speed=32 * MIB))
        await migrate(plan, witness, base=stage.directory, children=children)
        await demo.write_for(1, guest)
        await guest.command("pause")
        inside = where_it_lies(stage, place(3, stage.cells).offset + 100)
        flip(stage.overlay, inside)
        tampered = await guest.verify()
        flip(stage.overlay, inside)
        memory = await guest.verify()
        await guest.stop()
    return tampered, memory, witness.phases(memory.written)
