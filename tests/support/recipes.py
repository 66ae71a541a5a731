"""The shell recipes as an operator runs them: one set of variables, one recipe after another."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

from recipes.demo.guest import NODE
from recipes.demo.stage import Stage
from tests.support.processes import Process, run
from tests.support.servers import free_tcp_address

DIRECTORY = Path(__file__).resolve().parents[2] / "recipes"
LIMIT = 90.0  # seconds for a recipe
COMMANDS = Path(sys.executable).parent
RECIPES = sorted(DIRECTORY.glob("0*.sh"))


def variables_of(recipe: Path) -> set[str]:
    """The variables that a recipe takes from its environment: those in capitals, but bash's own."""
    code = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
    return set(re.findall(r"\$\{?([A-Z][A-Z_]+)\b", "\n".join(code))) - {"SECONDS"}


@dataclass(frozen=True)
class Operator:
    """Whoever types the recipes, with these variables exported."""

    variables: Mapping[str, str]

    def environment(self, changes: Mapping[str, str]) -> dict[str, str]:
        """The variables with changes, and our commands on the PATH."""
        return {**self.variables, **changes, "PATH": f"{COMMANDS}:{os.environ['PATH']}"}

    def run(self, number: int, *arguments: str, changes: Mapping[str, str]) -> CompletedProcess[str]:
        """Run recipe ``number``, with some variables changed; an empty one counts as not set."""
        return run(RECIPES[number - 1], *arguments, seconds=LIMIT, env=self.environment(changes))

    def log_of_b(self) -> str:
        """What B's QEMU has complained of, for a test that fails."""
        log = Path(self.variables["DESTINATION_QMP"] + ".log")
        return f"\n{log}:\n{log.read_text()}" if log.exists() else ""

    def start(self, number: int, log: Path, **changes: str) -> Process:
        """Start recipe ``number``, in a process group of its own, and do not wait for it."""
        return Process(["setsid", RECIPES[number - 1]], log, env=self.environment(changes))

    def qmp(self, host: str, *words: str) -> CompletedProcess[str]:
        """Execute a QMP command on host ``a`` or ``b``."""
        monitor = self.variables["SOURCE_QMP" if host == "a" else "DESTINATION_QMP"]
        return run(COMMANDS / "nbd-migrate", "qmp", monitor, *words)

    def must(self, number: int, *arguments: str, **changes: str) -> str:
        """Run it and return what it printed; it must succeed."""
        done = self.run(number, *arguments, changes=changes)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}{self.log_of_b()}"
        return done.stdout

    def fails(self, number: int, *arguments: str, **changes: str) -> str:
        """Run it and return the one line that it complained with; it must fail with exit code 1."""
        return self.complains(1, number, *arguments, changes=changes)

    def refuses(self, number: int, *arguments: str, **changes: str) -> str:
        """The same, but with exit code 2, as it was used in a wrong way."""
        return self.complains(2, number, *arguments, changes=changes)

    def complains(self, code: int, number: int, *arguments: str, changes: Mapping[str, str]) -> str:
        """Run it and return the one line that it complained with; it must fail with this exit code."""
        done = self.run(number, *arguments, changes=changes)
        assert done.returncode == code, f"{done.args}\n{done.stdout}{done.stderr}{self.log_of_b()}"
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr


def operator_of(stage: Stage) -> Operator:
    """The operator who migrates the demo's guest from A to B."""
    sockets = stage.sockets
    return Operator(
        {
            "DISK": str(stage.image),
            "OVERLAY": str(stage.overlay),
            "NBD_ADDRESS": "127.0.0.1",
            "NBD_PORT": str(free_tcp_address().port),
            "NBD_PID_FILE": str(sockets / "server.pid"),
            "FENCE_FILE": str(sockets / "fence.pid"),
            "NODE": NODE,
            "SOURCE_QMP": str(stage.monitor("a")),
            "DESTINATION_QMP": str(stage.monitor("b")),
            "DESTINATION_PID_FILE": str(sockets / "b.pid"),
            "MIGRATION": f"unix:{sockets / 'migration'}",
            "MOVE_TO": str(stage.moved),
        }
    )
