"""Somebody who comes to B's port for the RAM before A's QEMU does, and says nothing."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import Process, wait_until
from tests.support.servers import free_tcp_address
from tests.support.vms import ROOT, Scene, scene

LONG = 120.0


def stands_still(stage: Scene) -> bool:
    """Whether A's guest does nothing for a second."""
    before = stage.dots("a")
    time.sleep(1.0)
    return stage.dots("a") == before


@pytest.mark.exhaustive
@pytest.mark.parametrize("end", ["limit", "interrupted"])
def test_a_visitor_who_says_nothing_keeps_no_guest_from_running_for_longer_than_the_limit(
    tmp_path: Path, end: str
) -> None:
    with scene(tmp_path) as stage:
        port = free_tcp_address().port
        stage.change("destination", migration=f"tcp:127.0.0.1:{port}")
        stage.change("limits", command=20.0)
        argv = [sys.executable, "-m", "tests.support.visited", str(stage.plan_file())]
        with Process(argv, tmp_path / "run.log", cwd=ROOT) as run:
            run.wait_for((tmp_path / "begins").exists, "A's QEMU is about to be told", LONG)
            with socket.create_connection(("127.0.0.1", port), LONG):
                (tmp_path / "come").touch()
                if end == "interrupted":
                    wait_until(lambda: stands_still(stage), "the guest stands still", LONG)
                    run.signal(signal.SIGINT)
                assert run.wait(LONG) != 0
                assert "the guest runs on A as before" in run.output()
                if end == "limit":
                    assert f"is somebody else connected to tcp:127.0.0.1:{port}?" in run.output()
                # He is there still.
                stage.wait_until_guest_works("a")
        stage.wait_until_only(set())
        assert stage.capabilities_of_a() == []
        assert not list(tmp_path.rglob("*.tls"))
