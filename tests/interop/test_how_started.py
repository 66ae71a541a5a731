"""How A's QEMU was started, which is kept for the case that B is lost: real QEMUs, without a guest."""

from __future__ import annotations

from pathlib import Path

from nbdserve.common import clock
from recipes.hosts.host import Host
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.recovering.booting import how_started
from tests.support.processes import Process, listens, wait_until

QEMU = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none")


def kept(directory: Path, *more: str) -> tuple[str, ...]:
    """What is kept of a QEMU with these options."""
    monitor = directory / "a.qmp"
    plan = Plan(
        Source(qmp=str(monitor), image="/a.raw"),
        Export("nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), image="/b.raw", qmp="/run/b.qmp", migration="unix:/run/m"),
    )
    argv = (*QEMU, *more, "-qmp", f"unix:{monitor},server=on,wait=off")
    with Process(argv, directory / "a.log", cwd=directory):
        wait_until(lambda: listens(monitor), "the monitor")
        return clock.run(how_started(plan, Host("this host")))


def test_it_is_the_command_line_in_its_directory(tmp_path: Path) -> None:
    words = kept(tmp_path, "-name", "a guest", "-S")
    assert words[: len(QEMU) + 3] == ("env", "-C", str(tmp_path.resolve()), *QEMU)
    assert "a guest" in " ".join(words)
    assert "-S" not in words


def test_of_a_command_line_that_is_not_understood_nothing_is_kept(tmp_path: Path) -> None:
    """It is no reason to refuse the migration: whoever has started it does so again."""
    # QEMU takes the last one.
    (tmp_path / "vm.cfg").write_text('[name]\n  guest = "one"\n  guest = "a guest"\n')
    assert kept(tmp_path, "-readconfig", "vm.cfg") == ()
