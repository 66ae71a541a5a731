"""What operators do with a message or a page: they paste its commands into a shell, as they stand."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.processes import run

COMMANDS = Path(sys.executable).parent
SECONDS = 120.0


def after(words: str, text: str) -> str:
    """The command that follows these words in the last line of the text, up to its end or the next advice."""
    last = text.strip().splitlines()[-1]
    found = re.search(re.escape(words) + r": (.*?)(?=; (?:to|then|but|when)\b|$)", last)
    assert found, f"there is no {words!r} in: {last}"
    return found[1]


def paste(command: str, *, seconds: float = SECONDS, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run it in bash, with our commands on the PATH."""
    path = f"{COMMANDS}:{os.environ['PATH']}"
    return run("bash", "-c", command, seconds=seconds, env={"PATH": path}, cwd=cwd)


def pasted_well(command: str) -> str:
    """Its output; it must succeed."""
    done = paste(command)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def blocks(page: Path, heading: str) -> list[list[str]]:
    """The commands of a page's section, by its indented blocks: without their prompts, on a line each."""
    section = re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)
    (body,) = (each for each in section if each.startswith(heading))
    found = re.findall(r"(?:^    .*\n)+", body, flags=re.MULTILINE)
    return [_commands(block) for block in found]


def in_places(commands: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """Commands of a page, with the names and paths of a test in the place of the page's."""
    found = []
    for command in commands:
        for old, new in places.items():
            command = command.replace(old, new)
        found.append(command)
    return found


def _commands(block: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [re.sub(r"^[AB]# ", "", line.strip()) for line in lines]
