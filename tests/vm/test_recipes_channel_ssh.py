"""The five steps where A comes to B through ssh, whose connection may be lost."""

from __future__ import annotations

import getpass
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.support.guests import short_directory
from tests.support.pasting import COMMANDS
from tests.support.processes import wait_until
from tests.support.sshd import sshd
from tests.support.vms import DISK_SIZE, Scene, scene
from tests.vm.test_recipes_channel import Operator, arrived, complete, operator_of


@pytest.fixture
def through_ssh(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scene, Operator]]:
    """A guest on A, whose operator's ssh leads to B."""
    with ExitStack() as stack:
        place, directory = (stack.enter_context(short_directory()) for _ in range(2))
        server = stack.enter_context(sshd(place, f"SetEnv PATH={COMMANDS}:/usr/bin:/bin"))
        ssh = place / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {shlex.join(server.options)} "$@"\n')
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
        guest = stack.enter_context(scene(directory))
        monitors, qemu = (guest.monitor_a, guest.monitor_b), guest.plan.destination.qemu
        operator = operator_of(directory, guest.image, guest.overlay, DISK_SIZE, monitors, qemu)
        stack.callback(operator.end_everything)
        door = directory / "channel"
        where = f"{getpass.getuser()}@{server.address.host}:{server.address.port}"
        operator.variables |= {"LISTEN": f"unix:{door}", "CONNECT": f"ssh://{where}{door}"}
        yield guest, operator


def ssh_of(operator: Operator) -> psutil.Process:
    """The ssh of A's end."""
    (end,) = operator.ends_at_a()
    (child,) = [each for each in end.children() if Path(each.exe()).name == "ssh"]
    return child


@pytest.mark.representative
def test_a_guest_moves_through_ssh_whose_connection_may_be_lost(
    through_ssh: tuple[Scene, Operator],
) -> None:
    guest, operator = through_ssh
    arrived(guest, operator)
    for _ in range(2):
        lost = ssh_of(operator)
        lost.kill()
        wait_until(lambda: not lost.is_running(), "ssh is dead")  # noqa: B023 - it is over before the next one
        wait_until(lambda: "not connected" not in operator.status(), "the source is back")
        guest.wait_until_guest_works("b")
    complete(guest, operator)
