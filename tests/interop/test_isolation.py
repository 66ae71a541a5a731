"""No command, and no process that a command starts, runs what lies in the directory it happens to be in."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from recipes.hosts.host import Host, module
from recipes.migrate.watch import Orders
from tests.support.journals import begun
from tests.support.processes import run
from tests.support.servers import NBDSERVE
from tests.support.traps import lay, sprung

HERE = Host("this host")
ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "supervisor": (["/dev/null", "", "true"], '{"started": '),
    "fence": (["ready", "no.raw"], "no.raw: No such file or directory"),
    "probe": (["nbd+unix:///?socket=no"], "socket=no: No such file or directory"),
}


def test_wherever_python_is_started_it_is_told_to_stay_away_from_the_working_directory() -> None:
    for source in (
        each for package in ("nbdserve", "overlay", "recipes") for each in ROOT.glob(f"{package}/**/*.py")
    ):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                assert ast.unparse(node.elts[1]) == "'-P'", f"{source}:{node.lineno}"


def test_the_trap_would_catch_one_who_looks_there(tmp_path: Path) -> None:
    traps = lay(tmp_path / "traps")
    run("/usr/bin/python3", "-c", "import json", cwd=traps)
    assert sprung(traps)


@pytest.mark.parametrize("command", ["nbdserve", "nbd-overlay", "nbd-migrate"])
def test_commands_run_their_own_modules(tmp_path: Path, command: str) -> None:
    traps = lay(tmp_path / "traps")
    assert run(NBDSERVE.with_name(command), "--help", cwd=traps).returncode == 0
    assert sprung(traps) == ""


@pytest.mark.parametrize("name", OWN)
def test_the_small_programs_run_their_own_modules(tmp_path: Path, name: str) -> None:
    traps = lay(tmp_path / "traps")
    arguments, answer = OWN[name]
    done = run(*HERE.own(name, *arguments), cwd=traps, stdin="")
    assert answer in done.stdout + done.stderr
    assert sprung(traps) == ""


def test_the_guard_runs_its_own_modules(tmp_path: Path) -> None:
    traps = lay(tmp_path / "traps")
    journal = begun(tmp_path, "/no")
    orders = Orders(str(journal.directory), journal.fd, journal.lock.fd, owned=False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        words = module("guard", json.dumps(asdict(orders)))
        done = subprocess.run(
            words,
            cwd=traps,
            stdin=theirs.fileno(),
            pass_fds=[journal.fd, journal.lock.fd],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert "the orchestrator was killed: what was started has been ended" in done.stderr
    assert sprung(traps) == ""
