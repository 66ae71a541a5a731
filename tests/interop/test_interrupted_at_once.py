"""Ctrl-C at any instant from a command's start on: it ends quietly, also while it imports its modules."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import PATIENCE
from tests.support.recipes import COMMANDS

INSTANTS = [step / 100 for step in range(0, 40, 2)]
"""Seconds after the start; the imports take some tenths of one."""

OURS = re.compile(r'File "[^"]*/(nbdserve|overlay|recipes)/(?!cli/entry\.py)')
"""A line of a traceback that is not the interpreter's own start, of which no program is master.

That start ends in a traceback, or in ``KeyboardInterrupt`` alone and with exit code 1.
"""


@pytest.mark.parametrize("name", ["nbdserve", "nbd-overlay", "nbd-migrate"])
def test_an_interruption_at_any_instant_is_quiet(name: str, tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", MIB)
    arguments = {
        "nbdserve": ["-k", str(tmp_path / "socket"), str(tmp_path / "disk")],
        "nbd-overlay": ["--help"],
        "nbd-migrate": ["demo", "--help"],
    }[name]
    codes = set()
    for seconds in INSTANTS:
        with subprocess.Popen(
            [COMMANDS / name, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                time.sleep(seconds)
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=60 * PATIENCE)
            except BaseException:
                process.kill()
                raise
        assert not OURS.search(said), said
        if "KeyboardInterrupt" not in said:
            # It dies of the signal where the interpreter does not listen to it yet, or any more.
            assert process.returncode in (0, 130, -signal.SIGINT), said
            codes.add(process.returncode)
    assert 130 in codes, "no instant was one in which modules are imported"
