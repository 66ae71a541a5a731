"""What a host says, and how much of it is listened to."""

from __future__ import annotations

import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts import calls
from recipes.hosts.host import Host

LIMIT = 60.0


def test_an_answer_in_json_is_understood() -> None:
    assert clock.run(Host("A").told("echo", '{"size": 1}', limit=LIMIT)) == {"size": 1}


@pytest.mark.parametrize("answer", ["nbd-migrate 9.9", "", "[1]", '{"size": ', "[" * 100_000])
def test_another_answer_is_an_error_of_one_line_that_shows_how_it_begins(answer: str) -> None:
    """As a program's of another version."""
    with pytest.raises(MigrationError) as caught:
        clock.run(Host("A").told("printf", "%s\n\n", answer, limit=LIMIT))
    shown = repr(answer[:60].strip())
    assert str(caught.value) == (
        f"printf on A gives an answer that is not understood, {shown}; see which version of it is there"
    )


def test_of_what_has_no_end_not_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `yes` in the place of a login shell."""
    monkeypatch.setattr(calls, "MOST", 1 << 20)
    call = calls.Call(Host("A", ("sh", "-c", "head -c 64M /dev/zero", "sh")), ["true"])
    with pytest.raises(calls.HostError):
        clock.run(call.run(LIMIT))
    assert len(call._output) < 2 << 20


def test_a_command_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not for want of the program the error names none."""
    for error, said in (
        (FileNotFoundError(2, "No such file or directory", "frob"), "frob: No such file or directory"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ):

        async def spawn(*_: object, failure: OSError = error, **__: object) -> None:
            raise failure

        monkeypatch.setattr(calls, "spawn", spawn)
        with pytest.raises(MigrationError, match=f"^frob on A: {said}$"):
            clock.run(Host("A").run("frob", limit=LIMIT))
