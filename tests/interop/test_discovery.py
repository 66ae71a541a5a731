"""What discovery asks of real QEMUs, processes and sockets, without a guest."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.common.errors import OperatorError
from recipes.discovery.command_line.options import ALONE, KEYED, PLAIN
from recipes.discovery.process import find
from recipes.discovery.route import free_port, local_address
from tests.support.guests import short_directory
from tests.support.processes import Process, listens, run
from tests.support.servers import free_tcp_address

COLUMN = 16
"""Where the help of an option begins that has no argument; longer names push it further, by two spaces."""


def test_every_option_of_the_qemu_that_is_here_is_known_and_has_an_argument_or_none_as_it_says() -> None:
    said = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, timeout=60)
    lines = [
        line
        for line in said.stdout.splitlines()
        if line.startswith("-") and line.split()[0] not in ("-h", "-version")
    ]
    assert len(lines) > 100
    for line in lines:
        names, _, rest = line.partition(" ")
        column = len(line) - len(rest.lstrip())
        alone = not rest.strip() or column == COLUMN or (rest.startswith(" ") and column > COLUMN)
        for name in (each.lstrip("-") for each in names.split("/")):
            assert (name in ALONE) == alone, line
            assert (name in KEYED | PLAIN) != (name in ALONE), line


def test_a_process_is_found_by_its_monitor_and_by_its_id() -> None:
    with short_directory() as directory:
        # As QEMU names it, and as no other test does.
        name, config, port = secrets.token_hex(4), directory / "vm.cfg", free_tcp_address().port
        config.write_text('[name]\n  guest = "a guest"\n')
        argv = [
            *("qemu-system-x86_64", "-machine", "none", "-display", "none", "-readconfig", "vm.cfg"),
            *("-qmp", f"unix:{name},server=on,wait=off", "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"),
        ]
        with Process(argv, directory / "log", cwd=directory) as qemu:
            qemu.wait_for(lambda: listens(Path(name)), "a monitor")
            by_monitor = find(str(directory / name))
            assert list(by_monitor.argv) == argv
            assert by_monitor.directory == str(directory.resolve())
            assert by_monitor.configs == {"vm.cfg": config.read_text()}
            assert find(f"127.0.0.1:{port}") == find(str(by_monitor.pid)) == by_monitor


def test_of_two_that_listen_at_one_port_the_one_at_the_address_is_found(tmp_path: Path) -> None:
    """The command line of the other one would make another guest on B."""
    port = free_tcp_address().port

    def listening(address: str) -> Process:
        program = f"import signal, socket; s = socket.create_server(({address!r}, {port})); signal.pause()"
        return Process([sys.executable, "-c", program], tmp_path / f"{address}.log")

    def ready(process: Process, address: str) -> None:
        process.wait_for(lambda: accepts(address, port), "a listener")

    with listening("127.0.0.2") as second, listening("127.0.0.1") as first:
        ready(first, "127.0.0.1")
        ready(second, "127.0.0.2")
        assert find(f"127.0.0.1:{port}").pid == find(f"localhost:{port}").pid == first.pid
        assert find(f"127.0.0.2:{port}").pid == second.pid
        with pytest.raises(OperatorError, match=rf"^the process behind 127.0.0.3:{port} is not seen here"):
            find(f"127.0.0.3:{port}")
    with listening("0.0.0.0") as everywhere:
        ready(everywhere, "127.0.0.1")
        assert find(f"127.0.0.3:{port}").pid == everywhere.pid


def accepts(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0


def test_what_is_no_process_is_told_in_one_line(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("nbd-migrate")
    gone = subprocess.Popen(["true"])
    gone.wait()
    for source, reason in (
        (str(gone.pid), f"there is no process {gone.pid}"),
        (str(tmp_path / "no"), f"no monitor at {tmp_path}/no: No such file or directory"),
    ):
        for command in (("process", source), ("plan", "--source", source)):
            done = run(program, *command)
            assert done.returncode in (1, 2)
            assert done.stderr.strip().endswith(reason)
            assert len(done.stderr.splitlines()) == 1
    done = run(program, "plan", "--source", str(os.getpid()))
    assert "is not understood: the option " in done.stderr


def test_a_host_tells_the_address_that_it_has_towards_another_and_a_port_that_is_free() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"
    taken = free_tcp_address()
    with socket.create_server(("127.0.0.1", taken.port)):
        assert free_port("127.0.0.1", taken.port) > taken.port
