"""This project: ``nbd-migrate run``, with a policy and a channel."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from recipes.plans.channel import Channel
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.bench.migrate.guest import NODE
from tests.bench.migrate.hosts import ADDRESSES, DISK_PORT
from tests.bench.migrate.setting import PATIENCE, Moved, MoveError, Setting
from tests.support.processes import Process, check
from tests.support.servers import fresh_path
from tests.support.vms import NBD_MIGRATE, as_toml

_COMPLETE = "step 5  every block"
"""Begins the line by which the command says that nothing on A is needed any more."""

_LOOK = 0.01
"""Seconds between two looks for it."""


def moves(policy: str, channel: str, *options: str) -> Callable[[Setting], Moved]:
    """Return what moves a guest in this way."""
    return lambda setting: move(setting, "--policy", policy, "--channel", channel, *options)


def knows(policy: str) -> bool:
    """Tell whether the command has this policy."""
    return policy in check(NBD_MIGRATE, "run", "--help").partition("--policy {")[2].partition("}")[0].split(
        ","
    )


def plan(setting: Setting) -> Plan:
    """Return the plan."""
    hosts = setting.hosts
    return Plan(
        Source(str(setting.monitor("a")), str(setting.image), NODE, shell=tuple(hosts.on("a"))),
        Export(f"nbd://{ADDRESSES['a']}:{DISK_PORT}/disk"),
        Destination(
            qemu=setting.guest.qemu("b"),
            image=str(setting.target("raw")),
            node=NODE,
            qmp=str(setting.monitor("b")),
            migration=setting.ram,
            shell=tuple(hosts.on("b")),
        ),
        Channel(),
        Limits(connect=60.0, command=60.0, start=120.0),
    )


def move(setting: Setting, *options: str) -> Moved:
    """Move the guest."""
    place = fresh_path(setting.guest.sockets, "plan", ".toml")
    place.write_text(as_toml(plan(setting)))
    log = fresh_path(setting.guest.sockets, "run", ".log")
    argv: Sequence[str] = [str(NBD_MIGRATE), "run", str(place), *options, "--json"]
    began = time.monotonic()
    running = Process(argv, log, env={"XDG_STATE_HOME": str(setting.guest.sockets)})
    with running:
        while running.running and _COMPLETE not in running.output():
            if time.monotonic() > began + PATIENCE:
                break
            time.sleep(_LOOK)
        free = time.monotonic()
        if running.wait(60.0) != 0:
            raise MoveError(running.output())
    ended = time.monotonic()
    outcome = json.loads(running.output().splitlines()[-1])
    predicted, window = outcome["predicted"], outcome["window"]
    misjudged = None if predicted is None else abs(predicted - window) / window
    return Moved(began, free, ended, outcome["downtime_ms"], "raw", misjudged=misjudged)
