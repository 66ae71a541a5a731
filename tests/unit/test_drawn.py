"""The rounds of chaos, as they are drawn."""

from __future__ import annotations

from tests.support.drawn import ANY, CHOICES, Fate
from tests.support.vms import Role

ALL = dict.fromkeys(CHOICES, ANY)


def test_a_round_is_the_same_whatever_was_played_before_it() -> None:
    rounds = [Fate.draw(7, number, "overlay", ALL) for number in range(20)]
    assert Fate.draw(7, 19, "overlay", ALL) == rounds[19]
    assert Fate.draw(8, 19, "overlay", ALL) != rounds[19]


def test_many_rounds_have_every_value_and_every_victim() -> None:
    rounds = [Fate.draw(7, number, "overlay", ALL) for number in range(200)]
    for name, values in CHOICES.items():
        assert {getattr(each.setting, name) for each in rounds} == set(values)
    assert {each.victim for each in rounds} == set(Role) - {Role.FENCE, Role.B_AGAIN}
    assert {each.step for each in rounds} == set(range(7))


def test_what_is_asked_for_is_not_drawn() -> None:
    wanted = {"policy": "hybrid", "channel": "tls", "format": "qcow2", "disks": "1"}
    drawn = [Fate.draw(7, number, "overlay", wanted) for number in range(50)]
    assert {str(each.setting) for each in drawn} == {"hybrid tls qcow2 1"}
    there_is_none = {Role.TUNNEL, Role.CHANNEL, Role.CONNECTION, Role.ONE_OVERLAY}
    assert not {each.victim for each in drawn} & there_is_none


def test_qemu_itself_only_copies_after_the_guest() -> None:
    drawn = [Fate.draw(7, number, "qemu", ALL) for number in range(50)]
    assert {each.setting.policy for each in drawn} == {"postcopy"}
    assert not {each.victim for each in drawn} & {Role.OVERLAY, Role.ONE_OVERLAY, Role.SUPERVISOR_OF_OVERLAY}
