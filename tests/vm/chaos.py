"""``python -m tests.vm.chaos [--disks N] [ROUNDS [SEED [ENGINE]]]``: a process is killed in each migration.

Each round moves a real guest, with one disk or with up to three, and kills one process, chosen with the
moment from the seed: a part of the time that a migration takes on this machine. Whatever happens, the guest
must be on one side and work, or the message must say that it has ended because its QEMU was killed; its disks
must hold nothing but what was there and what it wrote; no process may be left that nobody needs. Then the
same plan runs again, or ``nbd-migrate finish`` does what is left, and must come to its end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.many_disks import many_disks
from tests.support.pasting import pasted_well
from tests.support.processes import wait_until
from tests.support.vms import Role, Scene, monitor, scene

LIMIT = 90.0
"""Seconds in which a migration must have ended, one way or the other."""

VICTIMS: list[Role] = [role for role in Role if role not in (Role.FENCE, Role.B_AGAIN, Role.ONE_OVERLAY)]
SIZES = (32 << 20, 8 << 20, 16 << 20)


@contextmanager
def quick_scene(directory: Path, engine: str, disks: int) -> Iterator[Scene]:
    """A guest whose disks are copied in a second or so, and that is not long without its server."""
    # By this name its guards are found.
    home = f"{directory}.state"
    os.environ["XDG_STATE_HOME"] = home
    try:
        made = scene(directory, engine) if disks == 1 else many_disks(directory, engine, SIZES[:disks])
        with made as stage:
            stage.change("limits", speed=64 << 20, reconnect_delay=2)
            yield stage
    finally:
        shutil.rmtree(home, ignore_errors=True)


def play(directory: Path, engine: str, disks: int, victim: Role, delay: float) -> str:
    """One round; returns what became of it. AssertionError when something is not as it must be."""
    with quick_scene(directory, engine, disks) as stage:
        with stage.run() as run:
            time.sleep(delay)
            # What dies after the migration has ended is not the migration's business.
            killed = [process.pid for process in victim.find(directory)] if run.running else []
            for pid in killed:
                psutil.Process(pid).send_signal(signal.SIGKILL)
            status = run.wait(LIMIT)
            time.sleep(1.0 if victim is Role.ORCHESTRATOR else 0.0)
            said = run.output()
        assert "Traceback" not in said, said
        return judge(stage, victim if killed else None, status, said)


def judge(stage: Scene, victim: Role | None, status: int, said: str) -> str:
    """See where the guest is and whether that is as it must be."""
    if victim is Role.ORCHESTRATOR:
        wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", 30.0)
    on_a, on_b = runs(stage, "a"), runs(stage, "b")
    assert not (on_a and on_b), f"the guest runs twice: {said}"
    if on_b:
        return judge_destination(stage, status, said)
    # What holds the disk of a guest that has arrived stays.
    kept = {Role.FENCE, Role.SERVER, Role.OVERLAY, Role.ONE_OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
    wait_until(lambda: not stage.started() - kept, "what was started has ended", 15.0)
    if on_a:
        assert status != 0, said
        stage.wait_until_only(set())
        stage.wait_until_guest_works("a")
        with stage.run() as again:
            assert again.wait(LIMIT) == 0, again.output()
        return f"the guest stays on A; again: {judge_destination(stage, 0, again.output())}"
    assert victim in (Role.A, Role.B, Role.SUPERVISOR_OF_B), said
    assert status == 1, said
    if victim is Role.A:
        assert "the guest runs on B" not in said, said
        if "A's QEMU: no monitor at" in said:
            return "A's QEMU had ended before anything was done"
        assert "with it the guest; its disk is untouched" in said, said
        return "the guest has ended with A's QEMU"
    # Only a B that had the guest may take it along.
    assert "the guest stands still on A" in said, said
    assert "the guest has stopped; its disk" in said, said
    finish(stage)
    stage.wait_until_only(set())
    assert stage.wrong_sectors(interrupted=True) == [], said
    return "the guest had arrived, and has ended with B's QEMU; its disk was completed"


def judge_destination(stage: Scene, status: int, said: str) -> str:
    """The guest works on B, and if all steps were done its disk is complete."""
    stage.wait_until_guest_works("b")
    assert not Role.A.find(stage.directory), f"A's QEMU is still there: {said}"
    if status != 0:
        finish(stage)
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == [], said
    return "the guest and its disk are on B" + (", at last" if status else "")


def finish(stage: Scene) -> None:
    """Do what the operator is told to do."""
    pasted_well(f"nbd-migrate finish {stage.directory / 'plan.toml'}")


def runs(stage: Scene, host: str) -> bool:
    """Whether the guest runs on ``a`` or ``b``; False where there is no QEMU."""
    role, address = (Role.A, stage.monitor_a) if host == "a" else (Role.B, stage.monitor_b)
    if not role.find(stage.directory):
        return False
    with monitor(address) as qemu:
        return qemu.state == "running"


def undisturbed(engine: str, disks: int) -> float:
    """How many seconds a migration takes here and now."""
    with (
        tempfile.TemporaryDirectory(prefix="nbd-chaos-") as name,
        quick_scene(Path(name), engine, disks) as stage,
    ):
        began = time.monotonic()
        with stage.run() as run:
            assert run.wait(LIMIT) == 0, run.output()
        return time.monotonic() - began


def main(arguments: list[str]) -> int:
    """Play the rounds, one line each; the exit code says whether all went as they must."""
    disks = 1
    if arguments[:1] == ["--disks"]:
        disks, arguments = int(arguments[1]), arguments[2:]
    rounds = int(arguments[0]) if arguments else 20
    seed = int(arguments[1]) if len(arguments) > 1 else random.randrange(1 << 32)
    engine = arguments[2] if len(arguments) > 2 else "overlay"
    victims: list[Role] = [role for role in VICTIMS if engine == "overlay" or "OVERLAY" not in role.name]
    chance = random.Random(seed)
    if engine == "overlay" and disks > 1:
        victims = [*victims, Role.ONE_OVERLAY]
    span = undisturbed(engine, disks)
    what = f"{rounds} rounds, seed {seed}, engine {engine}, disks {disks}"
    print(f"chaos: {what}; undisturbed {span:.1f} s", flush=True)
    failures = 0
    for number in range(rounds):
        victim, delay = chance.choice(victims), chance.uniform(0.02, 1.0) * span
        with tempfile.TemporaryDirectory(prefix="nbd-chaos-") as name:
            try:
                outcome = play(Path(name), engine, disks, victim, delay)
            except AssertionError as error:
                failures += 1
                outcome = f"FAILED: {error}"
        print(f"{number + 1:4}  {victim.name:<16} after {delay:.2f} s: {outcome}", flush=True)
    print(f"chaos: {rounds - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
