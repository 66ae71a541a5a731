"""The command line of nbd-migrate run, as far as it goes without a host."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.cli.main import main, make_parser, overrides
from tests.unit.recipes.plans.test_plan import MINIMAL


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan's file with nothing wrong in it."""
    path = tmp_path / "plan.toml"
    path.write_text(MINIMAL)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error with which the command refuses these words."""
    assert main(["run", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_plan_can_be_checked_without_touching_a_host(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--check", str(plan)]) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out


def test_mistakes_are_one_line(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nbd-migrate: " in refusal(capsys)
    assert "unrecognized arguments: --fast" in refusal(capsys, "--fast", str(plan))
    assert "'nbdkit'" in refusal(capsys, "--engine", "nbdkit", str(plan))
    assert "--speed 'quick' is not a size" in refusal(capsys, "--speed", "quick", "--check", str(plan))
    assert "destination.migration: 'tcp:a b:4444'" in refusal(capsys, "--to", "a b", "--check", str(plan))
    assert "source.qmp: 'x' is not usable" in refusal(capsys, "--source", "x", "--check", str(plan))


def test_a_plan_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "no.toml")]) == 1
    assert capsys.readouterr().err == f"nbd-migrate: {tmp_path}/no.toml: No such file or directory\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("b.example", "tcp:b.example:4444"),
        ("b.example:5555", "tcp:b.example:5555"),
        ("[2001:db8::2]", "tcp:[2001:db8::2]:4444"),
        ("[2001:db8::2]:5555", "tcp:[2001:db8::2]:5555"),
        ("2001:db8::2", "tcp:[2001:db8::2]:4444"),
        ("fe80::2%eth0", "tcp:[fe80::2%eth0]:4444"),
        ("[fe80::2%eth0]:5555", "tcp:[fe80::2%eth0]:5555"),
    ],
)
def test_the_destination_may_be_named_with_or_without_a_port(given: str, meant: str) -> None:
    arguments = make_parser().parse_args(["run", "--to", given, "plan.toml"])
    assert overrides(arguments)["destination"] == {"migration": meant}


def test_every_option_stands_for_a_key_of_the_plan() -> None:
    words = ["run", "--source", "/run/a", "--speed", "50M", "--move-aside", "/images/old", "plan.toml"]
    assert overrides(make_parser().parse_args(words)) == {
        "source": {"qmp": "/run/a"},
        "destination": {},
        "channel": {},
        "limits": {"speed": 50 << 20},
        "finish": {"move_aside": "/images/old"},
    }


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["resume", "-x"], "-x (see nbd-migrate resume --help)"),
        (["resume", "--boot", "--loud", "--more=3"], "--loud --more=3 (see nbd-migrate resume --help)"),
        (["resume", "vm", "-x"], "-x (see nbd-migrate resume --help)"),
        (["run", "--plan", "plan.toml"], "--plan (see nbd-migrate run --help)"),
        (["--loud"], "--loud (see nbd-migrate --help)"),
    ],
)
def test_an_option_that_there_is_not_is_named(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"nbd-migrate: unrecognized arguments: {named}\n"


@pytest.mark.parametrize(
    "words", [["resume"], ["resume", "--bo"], ["status", "--js"], ["finish", "--speed=3"]]
)
def test_what_is_missing_is_named_where_every_option_is_known(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "the following arguments are required" in capsys.readouterr().err
