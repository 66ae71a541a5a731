"""What a round of chaos moves, and how, drawn from its seed: policy, channel, format and number of disks."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.disks import MIB
from tests.support.many_disks import ManyDisks
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.servers import free_tcp_address
from tests.support.sshd import sshd
from tests.support.vms import Role, running

ANY = "any"
SIZES = (32 * MIB, 8 * MIB, 16 * MIB)
SPEED = 24 * MIB
"""Bytes per second: the copying is most of what a migration does."""

STEPS = (0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 6)
"""In which a process is killed; those of which there is more to be seen more often."""

SINCE = {
    Role.SERVER: 1,
    Role.SUPERVISOR_OF_SERVER: 1,
    Role.B: 3,
    Role.SUPERVISOR_OF_B: 3,
    Role.OVERLAY: 3,
    Role.ONE_OVERLAY: 3,
    Role.SUPERVISOR_OF_OVERLAY: 3,
    Role.TUNNEL: 1,
    Role.CHANNEL: 1,
}
"""The step in which a process is started, where it is not there from the beginning."""

UNTIL = {Role.GUARD: 4, Role.CHIEF: 4, Role.DEPUTY: 4}
"""The last step in which it is there, where that is not the last of all."""

LONGEST = 2.5
"""Seconds after which at the latest: what is shorter is left by then, and the next is struck."""

CHANNELS = ("unix", "plain", "tls", "ssh", "single")
"""Those of a plan, of which ``plain`` is over TCP; ``unix`` is what nothing but this host can see."""

CHOICES = {
    "policy": ("postcopy", "hybrid"),
    "channel": CHANNELS,
    "format": ("raw", "qcow2"),
    "disks": ("1", "2", "3"),
}
"""Of each of a round's properties, the values that it may have."""


@dataclass(frozen=True)
class Setting:
    """One way to migrate. ``disks`` is their number, as text; of qcow2 ones every other is raw."""

    engine: str
    policy: str
    channel: str
    format: str
    disks: str

    def __str__(self) -> str:
        return f"{self.policy} {self.channel} {self.format} {self.disks}"

    @property
    def victims(self) -> list[Role]:
        """The processes that there are."""
        never = {Role.FENCE, Role.B_AGAIN}
        if self.engine != "overlay":
            never |= {Role.OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
        if self.engine != "overlay" or self.disks == "1":
            never.add(Role.ONE_OVERLAY)
        if self.channel != "ssh":
            never |= {Role.TUNNEL, Role.CONNECTION}
        if self.channel != "single":
            never.add(Role.CHANNEL)
        return [role for role in Role if role not in never]


@dataclass(frozen=True)
class Fate:
    """A round: whom it strikes, how many seconds after the beginning of which step, and who does the rest.

    Step 0 begins with the command, and the rest is done by one of its subcommands.
    """

    setting: Setting
    victim: Role
    step: int
    delay: float
    rest: str

    def __str__(self) -> str:
        return f"{self.setting!s:<24} {self.victim.name:<21} {self.delay:.2f} s into step {self.step}"

    @classmethod
    def draw(cls, seed: int, number: int, engine: str, wanted: dict[str, str]) -> Fate:
        """Return that of one round, which depends on nothing else: ``wanted`` is a value of each, or ``any``.

        QEMU's own copying has one policy.
        """
        chance = random.Random(f"{seed}/{number}")
        drawn = {name: chance.choice(values) for name, values in CHOICES.items()}
        drawn |= {name: value for name, value in wanted.items() if value != ANY}
        if engine == "qemu":
            drawn["policy"] = "postcopy"
        setting = Setting(engine, **drawn)
        victim = chance.choice(setting.victims)
        steps = [step for step in STEPS if SINCE.get(victim, 0) <= step <= UNTIL.get(victim, 6)]
        rest, step = chance.choice(("finish", "resume")), chance.choice(steps)
        # Little is left to do then.
        is_short = setting.policy == "hybrid" and step > 4
        return cls(setting, victim, step, chance.uniform(0.0, LONGEST / 3 if is_short else LONGEST), rest)


@contextmanager
def drawn_scene(directory: Path, setting: Setting) -> Iterator[ManyDisks]:
    """A guest that runs on A, and a plan to move it so. Its operator's ssh, state and sockets are its own."""
    # By the first of these names its guards are found.
    home, runtime = Path(f"{directory}.state"), directory / "run"
    runtime.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.enter_context(environment(XDG_STATE_HOME=str(home), XDG_RUNTIME_DIR=str(runtime)))
        kind = Qcow2Disks if setting.format == "qcow2" else ManyDisks
        made = kind(directory, setting.engine, SIZES[: int(setting.disks)])
        made.change("limits", speed=SPEED, reconnect_delay=2)
        made.change("destination", policy=setting.policy)
        if setting.disks == "1":
            made.change("finish", move_aside=str(made.disks[0].moved))
        if setting.channel == "ssh":
            reach_b_by_ssh(made, stack)
        if setting.channel != "unix":
            made.change("export", uri=free_tcp_address().uri("vm"))
            there = free_tcp_address()
            made.change("destination", migration=f"tcp:{there.host}:{there.port}")
            made.change("channel", kind=setting.channel)
        stack.enter_context(running(made))
        yield made


def reach_b_by_ssh(made: ManyDisks, stack: ExitStack) -> None:
    """Have B be this host's sshd, to which the ssh on the PATH has the key."""
    place = made.directory / "ssh"
    place.mkdir()
    server = stack.enter_context(sshd(place))
    ssh = place / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {shlex.join(server.options)} "$@"\n')
    ssh.chmod(0o755)
    stack.enter_context(environment(PATH=f"{place}:{os.environ['PATH']}"))
    address = server.address
    made.change(
        "destination", host=f"ssh://{address.host}:{address.port}", bin=str(Path(sys.executable).parent)
    )


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
