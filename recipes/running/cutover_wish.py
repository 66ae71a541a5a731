"""The operator's word that the guest is to go now, of a run that copies its disk before (policy hybrid)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from recipes.migrate.journal import CUTOVER_ASKED, CUTOVER_TAKEN
from recipes.migrate.runtime import Migration
from recipes.running import asking
from recipes.running.asking import Known

ANSWER = 60.0
"""Seconds in which a run takes it: the end of a round may sync a disk."""

WISH = asking.Wish(CUTOVER_ASKED, CUTOVER_TAKEN)


def was_asked(m: Migration) -> bool:
    """Tell whether it was asked of a running migration, and is still; then that is taken."""
    directory = m.journal.directory
    asked = asking.text(directory, WISH.asked)
    if not asked:
        return False
    mark = os.urandom(8).hex()
    return asking.take(directory, WISH, mark, lambda name: asking.text(directory, name) == asked)


def ask(
    directory: Path,
    known: Known,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Ask it, and wait until it was taken. Raises MigrationError, as asking.ask() does."""
    asking.ask(directory, WISH, json.dumps({"mark": os.urandom(8).hex()}), known, ANSWER, sleep, tell)
