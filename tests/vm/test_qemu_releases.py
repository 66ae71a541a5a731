"""Where QEMU 10.0 (Debian 13) does something else than 7.2 (Debian 12), as docs/migrate.md has it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from tests.support import versions
from tests.support.jobs import Talk
from tests.support.processes import Process, check, listens, run, wait_until
from tests.support.vms import QEMU, Monitor, Role, Scene, monitor, scene
from tests.vm.test_migrate_safety import fence, migrated_by_hand


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    with scene(tmp_path, "qemu") as made:
        yield made


def active(a: Monitor) -> bool | None:
    """Whether the node of A's disk is active; None where QEMU does not tell."""
    nodes = a.execute("query-named-block-nodes", flat=True)
    (told,) = [node.get("active") for node in nodes if node["node-name"] == "disk0"]
    return None if told is None else bool(told)


def test_the_disk_of_a_guest_that_has_left_is_inactive_and_qemu_says_so_since_10(stage: Scene) -> None:
    tells = versions.qemu() >= (10, 0)
    with monitor(stage.monitor_a) as a:
        assert active(a) is (True if tells else None)
    with migrated_by_hand(stage), monitor(stage.monitor_a) as a:
        assert active(a) is (False if tells else None)


def test_a_migrated_sources_own_nbd_server_gives_data_but_since_10_no_block_status(stage: Scene) -> None:
    """A client that asks for it, as QEMU does, fails there; nbdserve is not concerned."""
    path = stage.directory / "own.nbd"
    uri = f"nbd+unix:///disk?socket={path}"
    with monitor(stage.monitor_a) as a:
        a.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        a.execute("block-export-add", id="own", type="nbd", node_name="disk0", name="disk")
    assert run("nbdinfo", "--map", uri).returncode == 0
    with migrated_by_hand(stage):
        check("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", uri)
        asked = run("nbdinfo", "--map", uri)
        if versions.qemu() >= (10, 0):
            assert "Operation not permitted" in asked.stderr
        else:
            assert asked.returncode == 0


@pytest.mark.skipif(versions.qemu() < (10, 0), reason="before QEMU 10 there is no such command")
@pytest.mark.representative
def test_the_fence_keeps_a_source_from_making_its_disk_active_again(stage: Scene) -> None:
    with migrated_by_hand(stage):
        pass
    with fence(stage), monitor(stage.monitor_a) as a:
        with pytest.raises(ExecuteError, match='Failed to get "write" lock'):
            a.execute("blockdev-set-active", node_name="disk0", active=True)
        assert active(a) is False
    with monitor(stage.monitor_a) as a:
        a.execute("blockdev-set-active", node_name="disk0", active=True)
        assert active(a), "without the fence nothing keeps it from it"


@pytest.mark.skipif(versions.qemu() < (10, 0), reason="before QEMU 10 there is no such command")
def test_a_guest_whose_disk_is_made_inactive_while_it_runs_takes_qemu_down(stage: Scene) -> None:
    with monitor(stage.monitor_a) as a:
        a.execute("blockdev-set-active", node_name="disk0", active=False)
    wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU aborts")
    assert "BDRV_O_INACTIVE" in (stage.directory / "a.log").read_text()


@pytest.mark.parametrize("stays", [False, True])
def test_a_destination_that_cannot_load_the_guest_ends_unless_told_otherwise(
    tmp_path: Path, stays: bool
) -> None:
    """Since 9.1 it can be told. nbd-migrate does not: it waits for the end, in every version."""
    monitor_path, incoming = tmp_path / "qmp", tmp_path / "incoming"
    argv = [*QEMU, "-qmp", f"unix:{monitor_path},server=on,wait=off", "-incoming", "defer"]
    with Process(argv, tmp_path / "qemu.log") as qemu:
        qemu.wait_for(lambda: listens(monitor_path), "a monitor")
        talk = Talk(monitor_path)
        options = {"exit_on_error": False} if stays else {}
        answer = talk.ask("migrate-incoming", uri=f"unix:{incoming}", **options)
        if stays and versions.qemu() < (9, 1):
            assert "unexpected" in answer["error"]["desc"]
            return
        assert "return" in answer
        with socket.socket(socket.AF_UNIX) as source:
            qemu.wait_for(lambda: listens(incoming), "it listens")
            source.connect(str(incoming))
            source.sendall(b"no guest" * 100)
        if stays:
            wait_until(lambda: "failed" in str(talk.ask("query-migrate")), "the migration has failed")
            assert talk.ask("query-status")["return"]["status"] == "inmigrate"
        else:
            assert qemu.wait() == 1
        talk.close()
