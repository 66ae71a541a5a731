"""``python -m tests.support.decisions PAGE``: write the table of recipes/migrate/decide.py as a page."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from recipes.migrate.decide import RULES, Action, Wish, decide
from recipes.migrate.state import Phase
from recipes.qemu.facts import Facts, OnA, OnB

TESTS = {
    "done": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "done, too late": ("journal", "test_a_guest_that_has_changed_sides_unseen_is_found_on_b"),
    "was taken back": ("journal", "test_what_cannot_be_removed_is_told_until_it_is_gone"),
    "both have the guest": (
        "journal",
        "test_a_guest_that_was_let_run_on_both_sides_is_the_operators_to_judge",
    ),
    "B had the guest": (
        "journal",
        "test_what_a_guest_has_written_on_b_is_not_removed_when_both_qemus_have_ended",
    ),
    "B is silent": ("journal", "test_a_guest_whose_monitors_cannot_be_found_is_left_alone"),
    "resume, A silent": ("journal", "test_a_guest_whose_monitors_cannot_be_found_is_left_alone"),
    "arrived, A does not say so": (
        "journal",
        "test_what_a_guest_has_written_on_b_is_not_removed_when_both_qemus_have_ended",
    ),
    "A has a guest, too": ("journal", "test_a_guest_that_runs_at_a_s_monitor_later_is_not_ended"),
    "again": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "prepared, A runs": ("again", "test_a_plan_runs_again_after_any_death"),
    "prepared, A gone": ("deaths", "test_nothing_is_left_when_the_source_itself_dies"),
    "prepared, not ours": ("safety", "test_a_failure_does_not_cancel_somebody_elses_migration"),
    "begin anew": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "sending": (
        "unreachable",
        "test_before_the_switch_over_a_b_that_is_away_does_not_keep_the_guest_from_a",
    ),
    "sending, begin anew": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "switching": ("two_deaths", "test_in_the_switch_over_the_guest_comes_to_b"),
    "sent": ("deaths", "test_the_source_may_die_as_soon_as_the_guest_has_left"),
    "B has the guest": ("two_deaths", "test_a_guest_that_comes_to_b_without_its_disk_waits_for_it"),
    "take back": ("two_deaths", "test_before_the_switch_over_the_guest_runs_on_on_a"),
    "arrived": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "start over": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "finish": ("journal", "test_a_migration_that_was_killed_is_taken_up_again"),
    "stopped, incomplete": (
        "finish",
        "test_the_disk_of_a_guest_whose_qemu_died_is_completed_with_or_without_it",
    ),
    "on B": ("deaths", "test_an_interrupted_stream_leaves_the_guest_on_b"),
    "stopped, complete": (
        "finish",
        "test_a_complete_disk_whose_guest_and_orchestrator_have_died_is_all_that_a_guest_needs",
    ),
    "on B, complete": (
        "overlay",
        "test_a_failure_behind_the_stream_does_not_say_that_the_source_is_needed",
    ),
    "recover on A": (
        "recover",
        "test_a_guest_that_was_lost_with_b_is_booted_on_a_with_all_that_it_wrote",
    ),
    "recovered": ("recover", "test_a_guest_that_was_lost_with_b_is_booted_on_a_with_all_that_it_wrote"),
    "recover on B": ("recover", "test_a_guest_that_was_lost_with_b_is_booted_there_again"),
    "half committed": ("recover", "test_killed_at_each_entry_of_its_journal_it_goes_on"),
    "recover, B has the guest": ("recover", "test_a_guest_that_lives_on_b_is_not_booted_a_second_time"),
    "not needed on A": ("recover", "test_a_guest_that_lives_on_b_is_not_booted_a_second_time"),
    "recover a complete disk": ("recover", "test_a_guest_that_lives_on_b_is_not_booted_a_second_time"),
}
"""Rules to which a test with real QEMUs comes: tests/vm/test_migrate_*.py, and its name."""

HEAD = """# What is decided after a failure

Written by `make docs` from the table in `recipes/migrate/decide.py`; every pair of a phase and of what can be
found is in it, and tested. The command itself asks it after a failure, its guard when the command was killed,
`nbd-migrate abort`, and, with other wishes, `nbd-migrate resume` and `recover`. "A" and "B" are what the two
QEMUs say, in the words of `recipes/qemu/facts.py`. What leads here, and what follows:
[failures.md](failures.md).
"""


def page() -> str:
    """The page, as Markdown."""
    return "".join(itertools.chain([HEAD], *(_wish(wish) for wish in Wish), _rules()))


def _wish(wish: Wish) -> Iterator[str]:
    titles = {
        Wish.GO_BACK: "When it cannot, or shall not, go on",
        Wish.GO_ON: "When it is resumed",
        Wish.ON_B: "When the guest is to be booted on B",
        Wish.ON_A: "When the guest is to be booted on A",
    }
    yield f"\n## {titles[wish]}\n"
    rows = ((phase, tuple(_phase(phase, wish))) for phase in Phase)
    # Phases in which the same holds, side by side in the journal or not, share a table.
    groups: dict[tuple[str, ...], list[Phase]] = {}
    for phase, lines in rows:
        groups.setdefault(lines, []).append(phase)
    for lines, phases in groups.items():
        yield f"\nPhase {', '.join(f'`{phase.value}`' for phase in phases)}:\n\n"
        yield "| A | B | rule | what is done |\n| --- | --- | --- | --- |\n"
        yield from lines


def _phase(phase: Phase, wish: Wish) -> Iterator[str]:
    """A line for each decision: those of A, and of B, that come to the same stand together."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for a in OnA:
        by_rule: dict[str, list[str]] = {}
        for b in OnB:
            by_rule.setdefault(decide(phase, wish, Facts(a, b)).rule, []).append(b.value)
        for rule, values in by_rule.items():
            found.setdefault((rule, tuple(values)), []).append(a.value)
    for (rule, on_b), on_a in found.items():
        action = next(each.action for each in RULES if each.name == rule)
        a_says = "anything" if len(on_a) == len(OnA) else ", ".join(on_a)
        b_says = "anything" if len(on_b) == len(OnB) else ", ".join(on_b)
        yield f"| {a_says} | {b_says} | {rule} | {action.value} |\n"


def _rules() -> Iterator[str]:
    yield "\n## What the operator reads\n\n"
    yield "| rule | the line | with real QEMUs in tests/vm |\n| --- | --- | --- |\n"
    for rule in RULES:
        words = "" if rule.action is Action.WAIT else f"`{rule.words}`"
        file, test = TESTS.get(rule.name, ("", ""))
        yield f"| {rule.name} | {words} | {f'`test_migrate_{file}.py::{test}`' if test else ''} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
