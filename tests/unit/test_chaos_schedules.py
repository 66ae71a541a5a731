"""The schedules of chaos, as they are drawn."""

from __future__ import annotations

from tests.chaos.schedules import FATAL, FEWEST, MOST, OF_LINK, Kind, Schedule
from tests.chaos.settings import ANY, CHOICES
from tests.support.vms import Role

ALL = dict.fromkeys(CHOICES, ANY)


def drawn(engine: str = ANY, count: int = 200, **wanted: str) -> list[Schedule]:
    return [Schedule.draw(7, number, engine, ALL | wanted) for number in range(count)]


def test_a_round_is_the_same_whatever_was_played_before_it() -> None:
    rounds = drawn(count=20)
    assert Schedule.draw(7, 19, ANY, ALL) == rounds[19]
    assert Schedule.draw(8, 19, ANY, ALL) != rounds[19]


def test_many_rounds_have_every_value_every_kind_and_every_victim() -> None:
    rounds = drawn()
    for name, values in CHOICES.items():
        assert {getattr(each.setting, name) for each in rounds} == set(values)
    assert {each.setting.engine for each in rounds} == {"overlay", "qemu"}
    faults = [fault for each in rounds for fault in each.faults]
    assert {fault.kind for fault in faults} == set(Kind)
    assert {fault.victim for fault in faults} == set(Role) - {Role.FENCE, Role.B_AGAIN} | {None}
    assert {fault.step for fault in faults} == set(range(7))


def test_a_round_has_several_faults_in_the_order_of_the_steps() -> None:
    rounds = drawn()
    assert {len(each.faults) for each in rounds} == set(range(FEWEST, MOST + 1))
    for each in rounds:
        steps = [fault.step for fault in each.faults]
        assert steps == sorted(steps)


def test_only_the_last_fault_of_a_round_ends_the_guest() -> None:
    fatal = [
        (each, fault)
        for each in drawn()
        for fault in each.faults
        if fault.kind is Kind.KILL and fault.victim in FATAL
    ]
    assert fatal
    assert all(each.faults[-1] is fault for each, fault in fatal)


def test_what_is_asked_for_is_not_drawn() -> None:
    rounds = drawn("overlay", 50, policy="hybrid", channel="tls", format="qcow2", disks="1")
    assert {str(each.setting) for each in rounds} == {"overlay hybrid tls qcow2 1"}
    there_is_none = {Role.TUNNEL, Role.CHANNEL, Role.CONNECTION, Role.ONE_OVERLAY}
    assert not {fault.victim for each in rounds for fault in each.faults} & there_is_none


def test_a_link_that_no_proxy_is_on_has_no_trouble() -> None:
    for rounds in (drawn("overlay", 50, channel="ssh"), drawn("qemu", 50, channel="tls")):
        assert not {fault.kind for each in rounds for fault in each.faults} & set(OF_LINK)


def test_qemu_itself_only_copies_after_the_guest() -> None:
    rounds = drawn("qemu", 50)
    assert {each.setting.policy for each in rounds} == {"postcopy"}
    victims = {fault.victim for each in rounds for fault in each.faults}
    assert not victims & {Role.OVERLAY, Role.ONE_OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
