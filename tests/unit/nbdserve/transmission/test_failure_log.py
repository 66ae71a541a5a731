"""What the log says of a failing disk."""

from __future__ import annotations

import pytest

from nbdserve.protocol.constants import Command, NbdError
from nbdserve.protocol.framing import Request
from nbdserve.transmission.failure_log import INTERVAL, FailureLog


def request(command: Command, offset: int) -> Request:
    return Request(0, command, 7, offset, 4096)


def test_a_failing_disk_is_told_of_at_once_and_then_rarely(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    failures = FailureLog("vm", lambda: now)
    failures.tell(request(Command.READ, 512), NbdError.EIO, "Input/output error")
    for number in range(5):
        failures.tell(request(Command.WRITE_ZEROES, number), NbdError.ENOSPC, "No space left on device")
    now += INTERVAL
    failures.tell(request(Command.FLUSH, 0), NbdError.EIO, "Input/output error")
    assert caplog.messages == [
        "export 'vm': read of 4096 bytes at 512 fails with EIO: Input/output error",
        "export 'vm': flush of 4096 bytes at 0 fails with EIO: Input/output error"
        " (and 5 more since the last such line)",
    ]


@pytest.mark.parametrize("error", [NbdError.EINVAL, NbdError.ENOTSUP, NbdError.EOVERFLOW])
def test_what_a_client_asks_for_in_vain_is_not_the_disks_failure(
    error: NbdError, caplog: pytest.LogCaptureFixture
) -> None:
    FailureLog("vm").tell(request(Command.TRIM, 0), error, "no")
    assert not caplog.messages
