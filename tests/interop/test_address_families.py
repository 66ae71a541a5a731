"""Addresses of every family: those that the machine lacks, and those that name an interface."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.families import without
from tests.support.processes import Argument, Process, check, run
from tests.support.servers import NBDSERVE, UnixAddress

BIN = Path(sys.executable).parent
NO_IPV6 = without(socket.AF_INET6)
NO_IPV4 = without(socket.AF_INET)
NO_IP = without(socket.AF_INET, socket.AF_INET6)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


@contextmanager
def serving(
    wrapper: list[str], image: Path, *options: Argument, sockets: int = 1
) -> Iterator[tuple[Process, list[str]]]:
    """A server behind a wrapper, and where it says that it listens, with so many sockets."""

    def listening() -> list[str]:
        return re.findall(r"serving .* on (\S+)", process.output())

    directory = image.parent
    argv = [*wrapper, NBDSERVE, "--pid-file", directory / "pid", *options, image]
    with Process(argv, directory / "server.log") as process:
        process.wait_for_pid_file(directory / "pid")
        process.wait_for(lambda: len(listening()) >= sockets, "all sockets are named in the log")
        yield process, listening()
        assert process.terminate() == 0, process.output()
        assert "Traceback" not in process.output(), process.output()


@pytest.mark.parametrize(
    ("lacking", "host"),
    [(NO_IPV6, "127.0.0.1"), (NO_IPV4, "::1")],
    ids=["without IPv6", "without IPv4"],
)
@pytest.mark.parametrize("where", [[], ["-b", ""], ["--listen", "nbd://:0"]], ids=str)
def test_a_family_that_the_kernel_lacks_is_left_out(
    image: Path, lacking: list[str], host: str, where: list[str]
) -> None:
    at = where if "nbd://:0" in where else [*where, "-p", "0"]
    with serving(lacking, image, "-f", "raw", *at) as (process, listening):
        assert len(listening) == 1
        port = listening[0].rpartition(":")[2]
        text = f"[{host}]" if ":" in host else host
        assert check("nbdinfo", "--size", f"nbd://{text}:{port}") == f"{MIB}\n"
        assert "not listened on: Address family not supported by protocol" in process.output()


@pytest.mark.parametrize("program", ["nbdserve", "nbd-overlay"])
def test_metrics_are_told_on_what_the_kernel_has(image: Path, program: str) -> None:
    words = {"nbdserve": ["-f", "raw"], "nbd-overlay": ["serve"]}[program]
    line = [*words, "-k", str(image.with_name("sock")), "--metrics", ":0"]
    for lacking, hosts in ((NO_IPV6, ["0.0.0.0"]), (NO_IPV4, ["[::]"]), ([], ["0.0.0.0", "[::]"])):
        argv: list[Argument] = [*lacking, BIN / program, *line, "--pid-file", image.with_name("pid"), image]
        with Process(argv, image.with_name("metrics.log")) as process:
            process.wait_for_pid_file(image.with_name("pid"))
            told = re.findall(r"metrics on http://(\S+):(\d+)/metrics", process.output())
            assert [host for host, _ in told] == hosts
            assert len({port for _, port in told}) == 1
            for host, port in told:
                address = ("127.0.0.1" if host == "0.0.0.0" else "::1", int(port))
                with socket.create_connection(address, 10) as scraper:
                    scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                    assert scraper.recv(12) == b"HTTP/1.0 200"
            assert process.terminate() == 0
        image.with_name("metrics.log").unlink()


@pytest.mark.parametrize(
    "where",
    [["-p", "0"], ["-b", "127.0.0.1", "-p", "0"], ["-k", "sock", "--metrics", "localhost:0"]],
    ids=str,
)
def test_where_nothing_is_left_one_line_says_so(image: Path, where: list[str]) -> None:
    done = run(*NO_IP, NBDSERVE, "-f", "raw", *where, image, seconds=10, cwd=image.parent)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nbdserve: ")
    assert "Address family not supported by protocol" in last
    assert "Traceback" not in done.stderr


def test_a_unix_socket_needs_no_other_family(image: Path) -> None:
    with serving(NO_IP, image, "-f", "raw", "-k", image.with_name("sock")):
        assert check("nbdinfo", "--size", UnixAddress(image.with_name("sock")).uri()) == f"{MIB}\n"


@root_only
@pytest.mark.parametrize("options", [["-b", "localhost"], []], ids=str)
def test_where_ipv6_is_switched_off_the_rest_is_served(image: Path, options: list[str]) -> None:
    off = "ip link set lo up; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; "
    hosts = "printf '::1 localhost\\n127.0.0.1 localhost\\n' >{0}/hosts; mount --bind {0}/hosts /etc/hosts; "
    script = off + hosts.format(image.parent) + 'exec "$@"'
    apart = ["unshare", "--net", "--mount", "sh", "-c", script, "sh"]
    # Of all addresses IPv6's is one even so.
    sockets = 1 if options else 2
    with serving(apart, image, "-f", "raw", "-p", "0", *options, sockets=sockets) as (process, listening):
        port = next(where for where in listening if ":" in where and "[" not in where).rpartition(":")[2]
        inside = ["nsenter", "--net", "--mount", "-t", str(process.pid)]
        assert check(*inside, "nbdinfo", "--size", f"nbd://127.0.0.1:{port}") == f"{MIB}\n"


LINK_LOCAL = "fe80::7"


@pytest.fixture
def link(image: Path) -> Iterator[list[str]]:
    """The words before a command that let it run in a namespace with a link-local address on ``vm0``."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    script = (
        "ip link set lo up; ip link add vm0 type veth peer name vm1; ip link set vm0 up; ip link set vm1 up; "
        f"ip address add {LINK_LOCAL}/64 dev vm0 nodad; echo ready; exec sleep 600"
    )
    with Process(["unshare", "--net", "sh", "-c", script], image.with_name("link.log")) as process:
        process.wait_for_line("ready")
        yield ["nsenter", "--net", "-t", str(process.pid)]


@pytest.mark.parametrize(
    "where",
    [
        ["-p", "1234", "-b", f"{LINK_LOCAL}%vm0"],
        ["-p", "1234", "-b", f"[{LINK_LOCAL}%vm0]"],
        ["--listen", f"nbd://[{LINK_LOCAL}%25vm0]:1234"],
        ["--listen", f"nbd://[{LINK_LOCAL}%vm0]:1234"],
    ],
    ids=str,
)
@pytest.mark.sampled(1)
def test_a_link_local_address_is_served_and_reached_by_its_interface(
    image: Path, link: list[str], where: list[str]
) -> None:
    allow = ["--allow", "fe80::%vm0/64", "--metrics", f"[{LINK_LOCAL}%vm0]:9100"]
    with serving(link, image, "-f", "raw", *where, *allow) as (process, listening):
        assert listening == [f"[{LINK_LOCAL}%vm0]:1234"]
        assert f"metrics on http://[{LINK_LOCAL}%vm0]:9100/metrics" in process.output()
        for uri in (
            f"nbd://[{LINK_LOCAL}%25vm0]:1234/",
            f"nbd://[{LINK_LOCAL}%vm0]:1234/",
            f"nbd:[{LINK_LOCAL}%vm0]:1234",
        ):
            told = json.loads(check(*link, BIN / "nbd-migrate", "probe", uri))
            assert told["size"] == MIB
        overlay = image.with_name("overlay.img")
        backing = f"nbd://[{LINK_LOCAL}%vm0]:1234"
        check(*link, BIN / "nbd-overlay", "create", "--backing", backing, overlay)
        facts = json.loads(check(BIN / "nbd-overlay", "info", "--json", overlay))
        assert facts["backing-filename"] == f"nbd://[{LINK_LOCAL}%25vm0]:1234/"
        check(*link, BIN / "nbd-overlay", "verify", overlay)


def test_allow_minds_the_interface(image: Path, link: list[str]) -> None:
    at = ["-f", "raw", "-p", "1234", "-b", f"{LINK_LOCAL}%vm0"]
    with serving(link, image, *at, "--allow", "fe80::%vm1/64") as (process, _):
        refused = run(*link, BIN / "nbd-migrate", "probe", f"nbd://[{LINK_LOCAL}%vm0]:1234/")
        assert refused.returncode == 1
        process.wait_for_line("turned away: its address is not in any --allow")
