"""Whether what was copied is compared in the end, as a plan or the command line says."""

from __future__ import annotations

from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from recipes.cli.main import make_parser, overrides
from recipes.plans.planfile import build

BASE: dict[str, Any] = {
    "source": {"qmp": "/run/a.qmp", "image": "/a.raw"},
    "export": {"uri": "nbd://192.0.2.1/vm"},
    "destination": {"qemu": ["qemu"], "image": "/b.raw", "qmp": "/run/b.qmp", "migration": "tcp:b:4444"},
}


def verifies(verify: object = None, *words: str) -> tuple[bool, bool]:
    """Whether it does, and whether A's server tells hashes."""
    document = BASE if verify is None else {**BASE, "finish": {"verify": verify}}
    plan = build(document, overrides(make_parser().parse_args(["run", *words, "plan.toml"])))
    return plan.verifies, plan.tells_hashes


def test_with_policy_hybrid_it_is_the_default() -> None:
    assert verifies(None, "--policy", "hybrid") == (True, True)
    assert verifies(False, "--policy", "hybrid") == (False, False)
    assert verifies(None, "--policy", "hybrid", "--no-verify") == (False, False)


def test_it_must_be_asked_for_with_the_other_and_the_command_line_wins() -> None:
    assert verifies() == (False, False)
    assert verifies(True) == (True, True)
    assert verifies(False, "--verify") == (True, True)
    assert verifies(True, "--no-verify") == (False, False)


@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_it_is_true_or_false(value: object) -> None:
    with pytest.raises(UsageError, match=r"^finish.verify: true or false is wanted"):
        verifies(value)


def test_the_engine_that_does_not_know_who_wrote_refuses_by_name() -> None:
    with pytest.raises(UsageError, match=r"^finish.verify: with destination.engine = 'qemu' B's QEMU copies"):
        verifies(None, "--verify", "--engine", "qemu")
