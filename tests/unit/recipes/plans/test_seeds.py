"""Which copy of B's is of which disk."""

from __future__ import annotations

from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from recipes.plans.plan import Plan
from recipes.plans.planfile import build
from recipes.plans.seeds import seeds_of, with_seeds

ONE: dict[str, Any] = {
    "source": {"qmp": "/run/a.qmp", "image": "/a.raw"},
    "export": {"uri": "nbd://192.0.2.1/vm"},
    "destination": {"qemu": ["qemu"], "image": "/b.raw", "qmp": "/run/b.qmp", "migration": "tcp:b:4444"},
}
TWO = {
    **ONE,
    "source": {"qmp": "/run/a.qmp"},
    "destination": {"qemu": ["qemu"], "qmp": "/run/b.qmp", "migration": "tcp:b:4444"},
    "disk": [
        {"image": "/a0", "target": "/b0", "drive": "disk0", "node": "virtio0"},
        {"image": "/a1", "target": "/b1", "drive": "disk1", "seed": "/old1"},
    ],
}


def seeds(document: dict[str, Any], *given: str) -> list[str]:
    """The seed of each disk."""
    made: Plan = with_seeds(build(document, {}), given)
    return [disk.seed for disk in made.disks]


def test_one_disk_needs_no_name() -> None:
    assert seeds(ONE) == [""]
    assert seeds(ONE, "/old") == ["/old"]
    assert seeds(ONE, "disk0=/old") == ["/old"]
    assert seeds(ONE, "/old=1") == ["/old=1"]


def test_of_several_disks_the_drive_or_the_node_says_which_and_the_plan_has_the_others() -> None:
    assert seeds(TWO) == ["", "/old1"]
    assert seeds(TWO, "virtio0=/old0") == ["/old0", "/old1"]
    assert seeds(TWO, "disk0=/old0", "disk1=/newer1") == ["/old0", "/newer1"]


@pytest.mark.parametrize(
    ("document", "given", "said"),
    [
        (TWO, ["/old"], r"^--seed /old: there are several disks: write NODE=FILE, NODE is of disk0, disk1$"),
        (TWO, ["disk0=/1", "virtio0=/2"], r"^--seed virtio0=/2: disk0 has one already$"),
        (ONE, ["old"], r"^destination.seed: 'old' must be an absolute path$"),
        (ONE, ["/b.raw"], r"^destination.seed: '/b.raw' is what is made there; name another copy$"),
        (ONE, ["/b.raw.map"], r"^destination.seed: '/b.raw.map' is what is made there"),
    ],
)
def test_what_cannot_be_is_refused(document: dict[str, Any], given: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        seeds(document, *given)


def test_the_engine_that_uses_no_seed_refuses_one_by_name() -> None:
    by_qemu = {**ONE, "destination": {**ONE["destination"], "engine": "qemu"}}
    with pytest.raises(
        UsageError, match=r"^destination.seed: with destination.engine = 'qemu' B's QEMU copies"
    ):
        seeds(by_qemu, "/old")


@pytest.mark.parametrize("option", ["--seed", "--target"])
def test_a_name_that_the_only_disk_does_not_have_is_told_and_a_path_with_an_equals_sign_is_one(
    option: str,
) -> None:
    names = [("disk0", "n0")]
    for text in ("disk1=/b.raw", "=/b.raw", "n0x=/b.raw"):
        with pytest.raises(UsageError, match=f"^{option} {text}: no disk is called .*: NODE is disk0 or n0"):
            seeds_of([text], names, option)
    for text in ("/srv/a=b.raw", "disk0=/srv/a=b.raw", "n0=/srv/a=b.raw"):
        assert seeds_of([text], names, option) == {0: "/srv/a=b.raw"}
