"""``nbd-migrate plan``: what is wrong with its options is told before anybody is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.cli import plan_command
from recipes.cli.main import main, make_parser
from recipes.discovery.document import Draft, Place
from tests.unit.recipes.discovery.test_document import draft


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_directory_for_the_disks_is_absolute(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is one of B's, which need not be this machine."""
    assert main([command, "--source", "/none.qmp", "--to-dir", "images"]) == 2
    assert capsys.readouterr().err == "nbd-migrate: --to-dir: 'images' must be an absolute path\n"


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    "option",
    ["--source", "--from", "--to", "--to-dir", "--export", "--channel", "--cutover", "--seed", "--target"],
)
def test_an_option_that_a_script_left_empty_is_not_taken_for_one_that_was_left_out(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an empty --to a guest would stay on this machine."""
    assert main([command, "--source", "/none.qmp", option, ""]) == 2
    said = capsys.readouterr().err
    assert f"argument {option}: it is empty" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    "source",
    ["a.qmp", "./a.qmp", "-", "12:", "host", "::1", "a..b:1", "ssh://a", "9" * 5000, f"{'x' * 64}:1", "a\nb"],
)
def test_a_source_that_is_neither_a_process_nor_a_monitor_is_refused(
    command: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"--source={source}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nbd-migrate: --source: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    "to", [" ", "/dev/null", ":1", "a..b", "[::1", "host:99999", "user@", "\n", "x" * 64]
)
def test_an_address_that_cannot_be_one_of_b_is_refused(
    command: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--source", "/none.qmp", "--to", to]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nbd-migrate: --to: ")
    assert said.count("\n") == 1


def test_where_our_commands_were_found_on_the_hosts_is_not_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = replace(draft(), destination=Place("ssh://b", "/run/b.qmp"))

    async def looked(_: object) -> tuple[Draft, tuple[str, str]]:
        return apart, ("", "/opt/there/bin")

    monkeypatch.setattr(plan_command, "_look", looked)
    given = make_parser().parse_args(["run", "--source", "/run/a.qmp", "--to", "ssh://b"])
    plan = plan_command.found(given, {})
    assert (plan.source.bin, plan.destination.bin) == ("", "/opt/there/bin")
    named = plan_command.found(given, {"destination": {"bin": "/elsewhere"}})
    assert named.destination.bin == "/elsewhere"


@pytest.mark.parametrize("target", ["/srv/a=b.raw", "disk0=/srv/a=b.raw", "disk0=rel/a=/b.raw"])
def test_a_target_with_an_equals_sign_in_its_path_is_one(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--source", "/none.qmp", "--target", target])
    assert ("--target" in capsys.readouterr().err) == ("rel" in target)
