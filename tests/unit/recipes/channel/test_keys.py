"""A stream that is meant to outlive the certificates of its migration is refused."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.certificates.authority import LIFE
from recipes.channel.keys import check_life
from recipes.plans.channel import Channel
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source

NOW = 1_900_000_000.0
YEAR = int(LIFE.total_seconds())


def plan(speed: int = 0, kind: str = "tls", export: str = "nbd://192.0.2.1/vm") -> Plan:
    """A plan whose stream may take so many bytes per second."""
    return Plan(
        Source(qmp="/a", image="/a.raw"),
        Export(uri=export),
        Destination(qemu=("qemu",), image="/b.raw", qmp="/b", migration="tcp:b:4444"),
        Channel(kind),
        Limits(speed=speed),
    )


def test_a_limit_of_the_speed_that_makes_it_longer_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^limits\.speed: at 1 KiB per second the disks take 730 days, .* 365 days"
    ):
        check_life(plan(1024), 1024 * YEAR * 2, 0.0, NOW)
    with pytest.raises(UsageError, match=r"^limits\.speed: "):
        check_life(plan(1024, "single"), 1024 * YEAR * 2, 0.0, NOW)
    check_life(plan(1024), 1024 * YEAR, 0.0, NOW)
    check_life(plan(), 1 << 60, 0.0, NOW)


def test_a_time_for_its_end_that_is_later_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--finish-by: the certificates of a migration live 365 days"):
        check_life(plan(), 1, NOW + YEAR + 1, NOW)
    check_life(plan(), 1, NOW + YEAR, NOW)


@pytest.mark.parametrize("other", [{"kind": "plain"}, {"export": "nbd+unix:///vm?socket=/nbd"}])
def test_where_there_are_no_certificates_nothing_expires(other: dict[str, str]) -> None:
    check_life(plan(1, **other), YEAR * 2, NOW + YEAR * 2, NOW)
