"""When the log says that a certificate will expire, and that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.common.pem import Dates
from nbdserve.service.certificate_expiry import DAY, Expiry, stages

YEAR = 365 * DAY
BEGIN = 1_800_000_000.0
PATH = Path("/pki/server-cert.pem")


def certificate(life: float) -> Dates:
    """A certificate that is valid for so many seconds."""
    return Dates("vm-host", "authority", BEGIN, BEGIN + life)


@pytest.mark.parametrize(
    ("life", "first", "second"), [(YEAR, 30 * DAY, DAY), (90 * DAY, 9 * DAY, 0.9 * DAY), (DAY, 8640, 864)]
)
def test_the_first_word_comes_a_month_ahead_or_sooner_where_lives_are_short(
    life: float, first: float, second: float
) -> None:
    end = BEGIN + life
    assert stages(certificate(life)) == pytest.approx((end - first, end - second, end))


def test_each_stage_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    end = BEGIN + YEAR
    expiry = Expiry([(PATH, certificate(YEAR))])
    what = f"{PATH}: the certificate of vm-host"
    for now, told in (
        (end - 31 * DAY, ""),
        (end - 20 * DAY, f"{what} expires on 2028-01-15 08:00 UTC, in 20 days: renew it"),
        (end - 19 * DAY, ""),
        (end - 3 * 3600, f"{what} expires on 2028-01-15 08:00 UTC, in 3 hours: renew it"),
        (end - 60, ""),
        (end, f"{what} has expired: new clients refuse it: renew it, and start the server again"),
        (end + DAY, ""),
    ):
        caplog.clear()
        expiry.look(now)
        assert caplog.messages == ([told] if told else []), now


def test_the_next_look_is_in_time_and_never_far_away() -> None:
    end = BEGIN + YEAR
    expiry = Expiry([(PATH, certificate(YEAR))])
    assert expiry.look(end - 40 * DAY) == 3600
    assert expiry.look(end - 30 * DAY - 60) == 60
    assert expiry.look(end - 7) == 7
    assert expiry.look(end + YEAR) == 3600
