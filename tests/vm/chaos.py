"""``python -m tests.vm.chaos [OPTIONS] [ROUNDS [SEED]]``: a process is killed in each migration.

Each round moves a real guest and kills one process. How the guest is moved (policy, channel, format and
number of its disks), which process, and when (so long after a step has begun) is drawn from the seed and the
round's number alone, so that ``--only ROUND`` plays one again. Whatever happens, the guest must be on one
side and work, or the message must say that it has ended because its QEMU was killed; its disks must hold
nothing but what was there and what it wrote; no process may be left that nobody needs. Then the same plan
runs again, or ``nbd-migrate finish`` or ``resume`` does what is left, and must come to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

from recipes.migrate import journal
from tests.support.drawn import ANY, CHOICES, Fate, drawn_scene
from tests.support.many_disks import ManyDisks
from tests.support.pasting import pasted_well
from tests.support.processes import wait_until
from tests.support.vms import Role, monitor

LIMIT = 180.0
"""Seconds in which a migration must have ended, one way or the other."""


def play(directory: Path, fate: Fate) -> str:
    """One round; returns what became of it. AssertionError when something is not as it must be."""
    with drawn_scene(directory, fate.setting) as stage:
        with stage.run() as run:
            line = f"step {fate.step} " if fate.step else ""
            wait_until(lambda: line in run.output() or not run.running, line, LIMIT)
            time.sleep(fate.delay)
            # What dies after the migration has ended is not the migration's business.
            killed = [each for each in fate.victim.find(directory) if run.running and struck(each)]
            status = run.wait(LIMIT)
            time.sleep(1.0 if fate.victim is Role.ORCHESTRATOR else 0.0)
            said = run.output()
        assert "Traceback" not in said, said
        outcome = judge(stage, fate, fate.victim if killed else None, status, said)
        return outcome if killed else f"nobody was killed; {outcome}"


def struck(process: psutil.Process) -> bool:
    """Kill a process; tell whether it was still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        return True
    return False


def judge(stage: ManyDisks, fate: Fate, victim: Role | None, status: int, said: str) -> str:
    """See where the guest is and whether that is as it must be."""
    if victim is Role.ORCHESTRATOR:
        wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", 30.0)
    on_a, on_b = runs(stage, "a"), runs(stage, "b")
    assert not (on_a and on_b), f"the guest runs twice: {said}"
    if on_b:
        return judge_destination(stage, fate, status, said)
    # What holds the disk of a guest that has arrived stays, and what leads to it.
    kept = {Role.FENCE, Role.SERVER, Role.OVERLAY, Role.ONE_OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
    kept |= {Role.TUNNEL, Role.CONNECTION, Role.CHANNEL}
    wait_until(lambda: not stage.started() - kept, "what was started has ended", 30.0)
    if on_a:
        assert status != 0, said
        stage.wait_until_only(set())
        stage.wait_until_guest_works("a")
        with stage.run() as again:
            assert again.wait(LIMIT) == 0, again.output()
        return f"the guest stays on A; again: {judge_destination(stage, fate, 0, again.output())}"
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
    do_the_rest(stage, fate)
    stage.wait_until_only(set())
    assert stage.wrong_sectors(interrupted=True) == [], said
    return f"the guest had arrived, and has ended with B's QEMU; {fate.rest} completed its disk"


def judge_destination(stage: ManyDisks, fate: Fate, status: int, said: str) -> str:
    """The guest works on B, and if all steps were done its disk is complete."""
    stage.wait_until_guest_works("b")
    # As long as the server does not read qcow2 files itself, A's QEMU must.
    if status == 0 or fate.setting.format == "raw":
        assert not Role.A.find(stage.directory), f"A's QEMU is still there: {said}"
    if status != 0:
        do_the_rest(stage, fate)
    stage.wait_until_only({Role.B})
    assert not Role.A.find(stage.directory), f"A's QEMU is still there: {said}"
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == [], said
    return "the guest and its disk are on B" + (f", at last, by {fate.rest}" if status else "")


def do_the_rest(stage: ManyDisks, fate: Fate) -> None:
    """Do what the operator is told to do."""
    [name] = journal.names()
    plan = stage.directory / "plan.toml"
    pasted_well(f"nbd-migrate resume {name}" if fate.rest == "resume" else f"nbd-migrate finish {plan}")


def runs(stage: ManyDisks, host: str) -> bool:
    """Whether the guest runs on ``a`` or ``b``; False where there is no QEMU."""
    role, address = (Role.A, stage.monitor_a) if host == "a" else (Role.B, stage.monitor_b)
    if not role.find(stage.directory):
        return False
    with monitor(address) as qemu:
        return qemu.state == "running"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.chaos")
    parser.add_argument("rounds", nargs="?", type=int, default=20)
    parser.add_argument("seed", nargs="?", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--engine", choices=("overlay", "qemu"), default="overlay")
    parser.add_argument("--only", type=int, metavar="ROUND", help="play this round of the seed alone")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", choices=(ANY, *values), default=ANY)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Play the rounds, one line each; the exit code says whether all went as they must."""
    asked = parse(arguments)
    wanted = {name: str(getattr(asked, name)) for name in CHOICES}
    numbers = [asked.only] if asked.only else range(1, asked.rounds + 1)
    what = ", ".join(f"{name} {value}" for name, value in wanted.items())
    print(f"chaos: {asked.rounds} rounds, seed {asked.seed}, engine {asked.engine}, {what}", flush=True)
    failures = 0
    for number in numbers:
        fate = Fate.draw(asked.seed, number, asked.engine, wanted)
        # Short, so that there is room in it for the sockets of ssh, by which its connections are found.
        directory = Path(tempfile.mkdtemp(prefix="nbd-", dir="/tmp"))
        try:
            outcome = play(directory, fate)
            shutil.rmtree(directory)
        except AssertionError as error:
            failures += 1
            outcome = f"FAILED, see {directory}: {error}"
        print(f"{number:4}  {fate}: {outcome}", flush=True)
    print(f"chaos: {len(numbers) - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
