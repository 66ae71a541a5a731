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
from tests.support.processes import run
from tests.support.servers import free_tcp_address

DIRECTORY = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(DIRECTORY.glob("0*.sh"))


def variables_of(recipe: Path) -> set[str]:
    """The variables that a recipe takes from its environment: those in capitals, but bash's own."""
    code = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
    return set(re.findall(r"\$\{?([A-Z][A-Z_]+)\b", "\n".join(code))) - {"SECONDS"}


@dataclass(frozen=True)
class Operator:
    """Whoever types the recipes, with these variables exported."""

    variables: Mapping[str, str]

    def run(
        self, number: int, *arguments: str, seconds: float = 60.0, **changes: str
    ) -> CompletedProcess[str]:
        """Run recipe ``number``, with some variables changed; an empty one counts as not set."""
        [recipe] = (each for each in RECIPES if each.name.startswith(f"{number:02}-"))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return run(recipe, *arguments, seconds=seconds, env={**self.variables, **changes, "PATH": path})

    def must(self, number: int, *arguments: str, seconds: float = 60.0, **changes: str) -> str:
        """Run it and return what it printed; it must succeed."""
        done = self.run(number, *arguments, seconds=seconds, **changes)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
        return done.stdout

    def fails(self, number: int, *arguments: str, code: int = 1, **changes: str) -> str:
        """Run it and return the one line that it complained with; it must fail with this exit code."""
        done = self.run(number, *arguments, **changes)
        assert done.returncode == code, f"{done.args}\n{done.stdout}{done.stderr}"
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
            "MIGRATION": f"unix:{sockets / 'migration'}",
            "MOVE_TO": str(stage.moved),
        }
    )
