"""The shell recipes: help that names every variable, and one line for each mistake."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from nbdserve.common.uri import NbdUri, parse_uri
from tests.support.disks import MIB, random_disk
from tests.support.monitors import monitor
from tests.support.processes import check, is_alive, run, wait_until
from tests.support.recipes import COMMANDS, DIRECTORY, RECIPES, Operator, variables_of
from tests.support.servers import free_tcp_address
from tests.support.vms import QEMU

# Enough for each recipe to get as far as its checks.
OPERATOR = Operator(
    {
        "DISK": "/nonexistent/disk",
        "OVERLAY": "/nonexistent/overlay",
        "NBD_ADDRESS": "127.0.0.1",
        "NBD_PORT": "1",
        "NBD_PID_FILE": "/nonexistent/pid",
        "FENCE_FILE": "/nonexistent/fence",
        "SOURCE_QMP": "/nonexistent/a.qmp",
        "DESTINATION_QMP": "/nonexistent/b.qmp",
        "MIGRATION": "unix:/nonexistent/migration",
    }
)
REQUIRED = {
    1: ["DISK", "NBD_ADDRESS"],
    2: ["OVERLAY", "NBD_ADDRESS"],
    3: ["OVERLAY", "NBD_ADDRESS", "DESTINATION_QMP", "MIGRATION"],
    4: ["DISK", "SOURCE_QMP", "MIGRATION"],
    5: ["DESTINATION_QMP"],
    6: ["DISK", "SOURCE_QMP", "DESTINATION_QMP"],
}


def described(text: str) -> set[str]:
    """The variables that a help text describes: the first word of an aligned line."""
    words = [line.split("  ")[0] for line in text.splitlines() if "  " in line.strip()]
    return {word for word in words if word.isupper()}


def test_there_are_six() -> None:
    assert [recipe.name[:3] for recipe in RECIPES] == ["01-", "02-", "03-", "04-", "05-", "06-"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_help_describes_exactly_the_variables_that_are_read(recipe: Path) -> None:
    for option in ("--help", "-h"):
        done = run(recipe, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Step {int(recipe.name[:2])}, on host ")
        assert described(done.stdout) == variables_of(recipe)


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, names in REQUIRED.items() for name in names])
def test_a_variable_that_is_not_set_is_one_line(number: int, name: str) -> None:
    assert f"set {name} (see 0{number}-" in OPERATOR.refuses(number, "qemu", **{name: ""})


@pytest.mark.parametrize(
    ("number", "name", "value", "complaint"),
    [
        (1, "DISK", "disk.raw", "DISK: 'disk.raw' must be an absolute path"),
        (1, "NBD_PORT", "http", "NBD_PORT: 'http' is not a whole number"),
        (2, "OVERLAY", "b.qed", "OVERLAY: 'b.qed' must be an absolute path"),
        (3, "RECONNECT_DELAY", "1.5", "RECONNECT_DELAY: '1.5' is not a whole number"),
        (3, "DESTINATION_QMP", "b.qmp", "DESTINATION_QMP: 'b.qmp' must be an absolute path"),
        (4, "MIGRATE_TIMEOUT", "soon", "MIGRATE_TIMEOUT: 'soon' is not a whole number"),
        (5, "SPEED", "10M", "SPEED: '10M' is not a whole number"),
        (6, "MOVE_TO", "away", "MOVE_TO: 'away' must be an absolute path"),
    ],
)
def test_a_value_that_cannot_be_right_is_one_line(number: int, name: str, value: str, complaint: str) -> None:
    assert complaint in OPERATOR.refuses(number, "qemu", **{name: value})


def test_what_is_no_disk_is_not_fenced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "disk")
    for image in (tmp_path / "disk", tmp_path, Path("/dev/null")):
        done = run(COMMANDS / "nbd-migrate", "fence", tmp_path / "ready", image, seconds=10)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"{image}: neither a file nor a block device" in done.stderr
    assert not (tmp_path / "ready").exists()


def test_the_destinations_command_line_must_be_given() -> None:
    assert "give the guest's QEMU command line" in OPERATOR.refuses(3)


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_bytes(bytes(512))
    there = str(existing)
    assert "DISK: /nonexistent/disk is neither a file nor a block device" in OPERATOR.fails(1)
    assert f"OVERLAY: {there} exists" in OPERATOR.fails(2, OVERLAY=there)
    assert "nbd://127.0.0.1:1/disk cannot be reached; run step 1" in OPERATOR.fails(2)
    assert "OVERLAY: there is no /nonexistent/overlay; run step 2" in OPERATOR.fails(3, "true")
    assert "no /missing on this host's PATH" in OPERATOR.fails(3, "/missing", OVERLAY=there)
    assert "no monitor at /nonexistent/a.qmp" in OPERATOR.fails(4, DISK=there)
    assert "no monitor at /nonexistent/b.qmp" in OPERATOR.fails(5)
    assert "no monitor at /nonexistent/b.qmp" in OPERATOR.fails(6)
    assert f"MOVE_TO: {there} exists" in OPERATOR.refuses(6, DISK=there, MOVE_TO=there)


def test_a_destination_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.write_bytes(bytes(512))
    changes = {"OVERLAY": str(overlay), "DESTINATION_QMP": str(tmp_path / "b.qmp"), "RECONNECT_DELAY": "0"}
    line = OPERATOR.fails(3, "qemu-system-x86_64", "-display", "none", **changes)
    assert "B's QEMU did not start, and the guest runs on, on A: qemu-system-x86_64: -blockdev" in line


@pytest.mark.parametrize(
    ("address", "name"),
    [("127.0.0.1", "a=b"), ("::1", "vm"), ("127.0.0.1", "größe #1, 50% a/b?c=d&e")],
)
def test_an_export_may_have_any_name_and_an_address_of_ipv6(tmp_path: Path, address: str, name: str) -> None:
    random_disk(tmp_path / "disk.raw", MIB)
    port = free_tcp_address(address).port
    operator = Operator(
        {
            "DISK": str(tmp_path / "disk.raw"),
            "OVERLAY": str(tmp_path / "overlay.qed"),
            "NBD_ADDRESS": address,
            "NBD_PORT": str(port),
            "NBD_NAME": name,
            "NBD_PID_FILE": str(tmp_path / "server.pid"),
            "DESTINATION_QMP": str(tmp_path / "b.qmp"),
            "MIGRATION": f"unix:{tmp_path}/migration",
        }
    )
    running = []
    try:
        operator.must(1)
        running.append(int((tmp_path / "server.pid").read_text()))
        operator.must(2)
        told = json.loads(check(COMMANDS / "nbd-overlay", "info", "--json", tmp_path / "overlay.qed"))
        assert parse_uri(told["backing-filename"]) == NbdUri(address, port, export=name)
        device = "virtio-blk-pci,drive=disk0,rerror=stop,werror=stop"
        operator.must(3, *QEMU, "-device", device)
        running.append(int((tmp_path / "b.qmp.pid").read_text()))
        with monitor(tmp_path / "b.qmp") as b:
            (export,) = [each for each in b.execute("query-named-block-nodes") if each["drv"] == "nbd"]
            assert export["image"]["virtual-size"] == MIB
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, running)), "they have ended")


def test_the_id_of_a_child_that_has_ended_may_be_anothers() -> None:
    """Ids are given out again: after minutes on a busy host, and a guest runs for months."""
    script = """
        . "$1"
        echo 1000 >/proc/sys/kernel/ns_last_pid
        true & ended=$!
        wait
        echo $((ended - 2)) >/proc/sys/kernel/ns_last_pid
        stranger=$(sleep 100 >/dev/null & echo $!)
        end_child "$ended"
        sleep 0.2
        [ "$stranger" = "$ended" ] && kill -0 "$stranger" && echo lives
        sleep 100 & child=$!
        end_child "$child"
        wait "$child" || echo $?
    """
    # Behind another shell, as the first process of a namespace is given every orphan.
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", '"$@"; exit $?', "sh"]
    found = check(*alone, "bash", "-c", script, "bash", DIRECTORY / "common.sh")
    assert found.split() == ["lives", str(128 + signal.SIGTERM)]


def test_only_a_refusal_says_that_no_qemu_listens() -> None:
    port = free_tcp_address().port
    # The last is an address that no connection can be made to.
    addresses = {"/nonexistent/qmp": 0, f"localhost:{port}": 0, "255.255.255.255:4000": 1}
    for address, expected in addresses.items():
        script = '. "$0/common.sh"; nobody_at "$1"'
        done = run("bash", "-c", script, str(DIRECTORY), address, env=OPERATOR.environment({}))
        assert done.returncode == expected, (address, done)
