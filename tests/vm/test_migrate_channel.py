"""What the network sees of a migration, and who else gets in: nothing, and nobody."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.apart import ADDRESSES, LONG, ApartScene, apart
from tests.support.disks import MIB
from tests.support.processes import Process, check, run, wait_until
from tests.support.vms import NBD_MIGRATE, ROOT, Role, monitor

OF_RAM = b"SeaBIOS"
"""In the RAM of every guest, and not on this disk."""

SAMPLES = 24


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ApartScene]:
    """A guest that runs on A."""
    with apart(tmp_path) as made:
        assert OF_RAM not in made.original
        yield made


@contextmanager
def onlooker(stage: ApartScene, *words: str) -> Iterator[None]:
    """Somebody on C."""
    command = stage.net.on("c", sys.executable, "-m", "tests.support.onlookers", *words)
    with Process(command, stage.directory / f"{words[0]}.log", cwd=ROOT) as process:
        process.wait_for_line("ing", 30.0)
        yield


def of_disk(stage: ApartScene, seen: bytes) -> list[int]:
    """The samples of the disk that are in what somebody has seen."""
    size = len(stage.original)
    starts = [4 * MIB + number * (size - 8 * MIB) // SAMPLES for number in range(SAMPLES)]
    return [at for at in starts if stage.original[at : at + 24] in seen]


def secrets_left(stage: ApartScene) -> list[Path]:
    """Files with a private key, but for the operator's and the hosts' own."""
    own = {stage.directory / name for name in ("key", "host_key")}
    found = []
    for path in set(stage.directory.rglob("*")) - own:
        if path.is_file() and path.stat().st_size < MIB and b"PRIVATE KEY" in path.read_bytes():
            found.append(path)
    return found


def journal_has_no_secret(stage: ApartScene) -> None:
    """Nor has any log."""
    assert secrets_left(stage) == []
    assert not list(stage.directory.rglob("*.tls"))


def ports(stage: ApartScene) -> set[int]:
    """The ports of TCP at which anybody listens on A or B, but for sshd and the monitors of the scene."""
    told = "".join(check(*stage.net.on(host, "ss", "-Hltn")) for host in ("a", "b"))
    return {int(line.split()[3].rpartition(":")[2]) for line in told.splitlines()} - {22, 4001}


@pytest.mark.parametrize(
    ("engine", "channel"),
    [
        ("overlay", "tls"),
        ("overlay", "ssh"),
        pytest.param("qemu", "tls", marks=pytest.mark.exhaustive),
        pytest.param("qemu", "ssh", marks=pytest.mark.exhaustive),
        ("overlay", "plain"),
    ],
)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_what_is_on_the_wire_and_what_a_stranger_gets(tmp_path: Path, engine: str, channel: str) -> None:
    with apart(tmp_path, engine=engine) as stage, ExitStack() as onlookers:
        captured, visited = stage.directory / "captured", stage.directory / "visited"
        onlookers.enter_context(onlooker(stage, "wire", "to-b", str(captured)))
        # Without TLS whoever comes first to the port of the RAM spoils the migration.
        doors = [f"{ADDRESSES['a']}:10809", f"{ADDRESSES['b']}:4444"][: 1 if channel == "plain" else 2]
        onlookers.enter_context(onlooker(stage, "stranger", str(visited), *doors))
        # Long enough for many visits.
        stage.change("limits", speed=16 * MIB)
        with stage.run("--channel", channel) as run:
            run.wait_for_line(" of 64 MiB", LONG)
            listening = ports(stage)
            assert run.wait(LONG) == 0, run.output()
        onlookers.close()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []
        seen = captured.read_bytes()
        captured.unlink()
        assert len(seen) > len(stage.original), "the disk has passed here"
        assert (listening == set()) == (channel == "ssh")
        if channel in ("tls", "ssh"):
            assert of_disk(stage, seen) == []
            assert OF_RAM not in seen
        else:
            assert len(of_disk(stage, seen)) > SAMPLES // 2
            assert OF_RAM in seen
        for number in range(len(doors)):
            told = Path(f"{visited}.{number}").read_bytes()
            assert (b"connected" in told) == (channel != "ssh")
            assert of_disk(stage, told) == []
            assert stage.original[:64] not in told
            assert OF_RAM not in told
            assert len(told) < MIB
        journal_has_no_secret(stage)


def test_a_third_host_with_certificates_of_its_own_gets_no_export(stage: ApartScene) -> None:
    stage.change("limits", speed=4 * MIB)
    with stage.run() as run_:
        run_.wait_for_line(" of 64 MiB", LONG)
        for scheme in ("nbd", "nbds"):
            uri = f"{scheme}://{ADDRESSES['a']}:10809/vm"
            done = run(*stage.net.on("c", str(NBD_MIGRATE), "probe", uri), seconds=60.0)
            assert done.returncode == 1, done.stdout
        [here] = [path for path in stage.directory.rglob("*.tls") if path.name.startswith("b")]
        assert {oct(each.stat().st_mode & 0o777) for each in here.iterdir()} == {"0o600"}
        assert here.stat().st_mode & 0o777 == 0o700
        assert run_.wait(LONG) == 0, run_.output()
    stage.wait_until_guest_works("b")
    journal_has_no_secret(stage)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", ["LAUNCH", "MIGRATE", "SWITCHOVER"])
def test_a_is_as_before_when_the_migration_fails(stage: ApartScene, moment: str) -> None:
    with monitor(stage.monitor_a) as a:
        before = a.execute("query-migrate-parameters")
    with stage.doomed(moment, "SERVER" if moment == "LAUNCH" else "B") as run:
        assert run.wait(LONG) == 1, run.output()
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "everything has ended", 60.0)
    with monitor(stage.monitor_a) as a:
        assert a.execute("query-migrate-parameters") == before
        assert all("tls" not in each["type"] for each in a.execute("qom-list", path="/objects"))
    assert stage.capabilities_of_a() == []
    journal_has_no_secret(stage)


def test_nothing_is_left_of_the_keys_when_the_orchestrator_is_killed(stage: ApartScene) -> None:
    with stage.doomed("SWITCHOVER", "ORCHESTRATOR") as run:
        assert run.wait(LONG) == -signal.SIGKILL
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the guard has acted", 60.0)
    wait_until(lambda: not stage.started(), "everything has ended", 60.0)
    journal_has_no_secret(stage)
    with monitor(stage.monitor_a) as a:
        assert all("tls" not in each["type"] for each in a.execute("qom-list", path="/objects"))


def test_resume_finds_the_keys_and_removes_them(stage: ApartScene) -> None:
    stage.change("limits", speed=4 * MIB)
    with stage.doomed("PROGRESS", "ORCHESTRATOR") as run:
        assert run.wait(LONG) == -signal.SIGKILL
    # A server that is started again needs them.
    for process in Role.SERVER.find(stage.directory):
        process.kill()
    with stage.migrate("resume", "a", log="resume.log") as again:
        assert again.wait(LONG) == 0, again.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []
    journal_has_no_secret(stage)
