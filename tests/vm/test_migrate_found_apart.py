"""A guest on another host is found out over ssh, and moved to a third machine, without a plan's file."""

from __future__ import annotations

import tomllib
from pathlib import Path

from tests.support.apart import ADDRESSES, LONG, ApartScene, apart
from tests.support.vms import Role

A, B = (f"ssh://root@{ADDRESSES[host]}" for host in ("a", "b"))


def printed(stage: ApartScene, source: str, *words: str) -> str:
    """What ``nbd-migrate plan`` prints on C."""
    log = f"plan-{Path(source).name}.log"
    with stage.migrate("plan", "--source", source, *words, log=log) as plan:
        assert plan.wait(LONG) == 0, plan.output()
        return plan.output()


def test_a_guest_is_found_and_moved_between_two_hosts_that_ssh_leads_to(tmp_path: Path) -> None:
    with apart(tmp_path) as stage:
        there = tmp_path / "there"
        there.mkdir()
        stage.overlay, stage.monitor_b = there / "a.raw", tmp_path / "a.moved.qmp"
        (tmp_path / "b.serial").symlink_to(tmp_path / "a.moved.serial")
        [qemu] = Role.A.find(tmp_path)
        hosts = ("--from", A, "--to", B, "--to-dir", str(there))
        text = printed(stage, str(qemu.pid), *hosts)
        plan = tomllib.loads(text)
        assert plan == tomllib.loads(printed(stage, str(stage.monitor_a), *hosts))
        assert (plan["source"]["host"], plan["destination"]["host"]) == (A, B)
        assert plan["export"]["uri"] == f"nbd://{ADDRESSES['a']}:10809/disk"
        assert plan["destination"]["migration"] == f"tcp:{ADDRESSES['b']}:4444"
        file = tmp_path / "found.toml"
        file.write_text(f"{text}\n[limits]\nconnect = 60\ncommand = 60\nstart = 120\n")
        with stage.migrate("run", str(file)) as run:
            assert run.wait(LONG) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.nothing_is_left_of_ssh()
        stage.quit_b()
        assert stage.wrong_sectors() == []
