"""The decision table, for every combination of phase, wish and what is found; no QEMU needed."""

from __future__ import annotations

import itertools

import pytest

from recipes.migrate.decide import (
    AS_BEFORE,
    BACK,
    COMMITTING,
    MOVING,
    ON_B,
    PREPARING,
    RULES,
    SENDING,
    WHOLE,
    Action,
    Wish,
    asks_b,
    decide,
    told,
)
from recipes.migrate.state import OVER, Phase
from recipes.qemu.facts import Facts, OnA, OnB
from tests.support.journals import begun

EVERYTHING = [(phase, wish, Facts(a, b)) for phase, wish, a, b in itertools.product(Phase, Wish, OnA, OnB)]
LETS_A_GO_ON = {Action.TAKE_BACK, Action.END_B_FIRST, Action.START_OVER}
ENDS_B = LETS_A_GO_ON | {Action.CLEAN_UP}


def test_every_phase_belongs_to_one_group() -> None:
    groups = [PREPARING, SENDING, MOVING, BACK, ON_B, WHOLE, COMMITTING, OVER]
    assert sorted(phase.name for group in groups for phase in group) == sorted(phase.name for phase in Phase)


def test_there_is_a_decision_for_everything_that_can_be_found() -> None:
    for phase, wish, facts in EVERYTHING:
        assert decide(phase, wish, facts).action in Action


def test_every_rule_decides_something() -> None:
    used = {decide(*each).rule for each in EVERYTHING}
    assert used == {rule.name for rule in RULES}
    assert len(used) == len(RULES)


def test_a_never_goes_on_once_the_guest_is_on_b() -> None:
    for phase, wish, facts in EVERYTHING:
        if phase in ON_B | WHOLE:
            assert decide(phase, wish, facts).action not in LETS_A_GO_ON, (phase, wish, facts)


def test_a_source_that_has_sent_everything_is_never_told_to_go_on_by_the_table() -> None:
    for phase, wish, facts in EVERYTHING:
        if phase in SENDING | MOVING | BACK and facts.a is OnA.LEFT:
            assert decide(phase, wish, facts).action not in LETS_A_GO_ON, (phase, wish, facts)


def test_nothing_that_may_carry_the_guest_is_ended_unless_a_says_that_it_has_the_guest() -> None:
    for phase, wish, facts in EVERYTHING:
        may_have = phase in SENDING | MOVING | BACK and facts.b in (OnB.HAS_GUEST, OnB.STOPPED)
        # Before the switch-over A keeps the end of the state; where A says that it failed, the guest is A's.
        if facts.a in (OnA.RUNS, OnA.SENDS, OnA.HOLDS):
            may_have = False
        if may_have or phase in ON_B | WHOLE:
            assert decide(phase, wish, facts).action not in ENDS_B, (phase, wish, facts)


def test_nothing_is_ended_while_it_is_not_known_who_has_the_guest() -> None:
    for phase, wish, facts in EVERYTHING:
        unknown = facts.a is OnA.SILENT or (facts.a is OnA.GONE and facts.b is OnB.SILENT)
        if phase in MOVING | BACK and unknown:
            action = decide(phase, wish, facts).action
            if facts.b in (OnB.HAS_GUEST, OnB.STOPPED):
                assert action in {Action.KEEP_B, Action.FINISH, Action.KEEP}, (phase, wish, facts)
            else:
                assert action is Action.KEEP, (phase, wish, facts)


def test_another_qemu_at_a_s_address_is_nobody_to_be_asked_once_the_switch_over_was_told() -> None:
    for phase, wish, facts in EVERYTHING:
        if phase in MOVING | BACK and facts.a is OnA.ANOTHER:
            action = decide(phase, wish, facts).action
            assert action in {Action.KEEP, Action.CLEAN_UP, Action.WAIT}, (wish, facts)
            # What was made is removed only where B's QEMU never had the guest.
            if action is Action.CLEAN_UP:
                assert facts.b in (OnB.NONE, OnB.LATE)


def test_waiting_comes_to_an_end() -> None:
    """What is waited for is told as ``stuck`` or ``late`` when its time is over, and then nobody waits."""
    for phase, wish, facts in EVERYTHING:
        if decide(phase, wish, facts).action is Action.WAIT:
            assert facts.a is OnA.SWITCHES or facts.b is OnB.WAITS


@pytest.mark.parametrize("phase", sorted(PREPARING | SENDING | MOVING, key=str))
def test_before_the_cut_over_whoever_gives_up_leaves_the_guest_running_on_a(phase: Phase) -> None:
    for a in (OnA.RUNS, OnA.SENDS, OnA.HOLDS):
        if a is not OnA.RUNS and phase in PREPARING:
            continue
        decision = decide(phase, Wish.GO_BACK, Facts(a, OnB.WAITS))
        assert decision.action in {Action.CLEAN_UP, Action.TAKE_BACK, Action.END_B_FIRST}
        assert decision.words == AS_BEFORE


def test_before_the_switch_over_the_guest_goes_on_before_b_is_asked_anything() -> None:
    """B's host may be away, and the guest would stand still for as long as that is looked at.

    One that stands while nothing is under way was paused before.
    """
    for a in (OnA.RUNS, OnA.SENDS, OnA.HOLDS):
        assert not asks_b(Phase.MIGRATE, Wish.GO_BACK, a)
        assert decide(Phase.MIGRATE, Wish.GO_BACK, Facts(a, OnB.SILENT)).action is Action.TAKE_BACK


def test_somebody_elses_migration_is_not_touched() -> None:
    for phase in PREPARING:
        for a in (OnA.SENDS, OnA.HOLDS, OnA.SWITCHES, OnA.STUCK, OnA.LEFT):
            for b in OnB:
                # Sent to our B, by hand, it is not ours either.
                sent = phase in (Phase.LAUNCH, Phase.PRECOPY) and a is OnA.LEFT and b is OnB.HAS_GUEST
                expected = Action.KEEP if sent else Action.CLEAN_UP
                assert decide(phase, Wish.GO_BACK, Facts(a, b)).action is expected
                assert decide(phase, Wish.GO_ON, Facts(a, b)).action is Action.KEEP


def test_nothing_on_a_is_ended_that_may_have_a_guest_of_its_own() -> None:
    """As one that was started there long after the guest had left."""
    for phase, wish, facts in EVERYTHING:
        if phase in ON_B | WHOLE and facts.a not in (OnA.LEFT, OnA.GONE, OnA.SILENT):
            assert decide(phase, wish, facts).action in {Action.KEEP, Action.KEEP_B}, (phase, wish, facts)


def test_the_words_of_every_rule_can_be_told(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    journal = begun(tmp_path, "/a")
    assert journal.state is not None
    for rule in RULES:
        assert "{" not in told(rule.words, journal.state)
    journal.close()
