"""Names with several addresses, some of them dead: in a network and with an /etc/hosts of the test's own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.overlays import NBD_OVERLAY, make_overlay
from tests.support.processes import Argument, Process, check, run
from tests.support.servers import NBDSERVE
from tests.support.tls import Identities

PORT = 10811
DEAD_6, LIVE_6, FAR_6 = "2001:db8::1", "2001:db8::2", "2001:db8::3"
DEAD_4, LIVE_4 = "192.0.2.1", "192.0.2.2"
"""Nothing answers at the dead ones, not even that nobody listens, as the far host does.

IPv6 comes first by the system's rules.
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

HOSTS = f"""
127.0.0.1 localhost
{DEAD_6} localhost
{DEAD_6} dead-first.example
{LIVE_4} dead-first.example
{LIVE_6} refused-first.example
{FAR_6} refused-far.example
{LIVE_4} refused-far.example
{LIVE_4} refused-first.example
{DEAD_4} ipv6-only.example
{LIVE_6} ipv6-only.example
{DEAD_6} all-dead.example
{DEAD_4} all-dead.example
"""

NETWORK = f"""
mount --bind "$1" /etc/hosts; mount --bind "$2" /etc/resolv.conf
setpriv --pdeathsig KILL unshare --net sleep 600 & far=$!
until [ "$(readlink /proc/$far/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 netns $far
nsenter --net -t $far sh -c 'ip link set v1 up; ip address add {FAR_6}/64 dev v1 nodad'
ip address add {LIVE_4}/24 dev v0; ip address add {LIVE_6}/64 dev v0 nodad
ip neighbor add {DEAD_4} lladdr 02:00:00:00:00:01 dev v0
ip neighbor add {DEAD_6} lladdr 02:00:00:00:00:01 dev v0
echo ready; exec sleep 600
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The words before a command that let it run in that network."""
    directory = tmp_path_factory.mktemp("network")
    (directory / "hosts").write_text(HOSTS)
    # Nobody answers there, and it is waited for for long.
    (directory / "resolv.conf").write_text(f"nameserver {DEAD_4}\noptions timeout:30 attempts:5\n")
    argv = ["unshare", "--net", "--mount", "sh", "-ec", NETWORK, "sh"]
    argv += [str(directory / "hosts"), str(directory / "resolv.conf")]
    with Process(argv, directory / "network.log") as process:
        process.wait_for_line("ready")
        yield ["nsenter", "--net", "--mount", "-t", str(process.pid)]


@contextmanager
def serving(inside: list[str], directory: Path, address: str, *options: Argument) -> Iterator[bytes]:
    """A server of a disk at one address of that network; yields what is on the disk."""
    content = random_disk(directory / "disk", MIB)
    argv = [*inside, NBDSERVE, "-f", "raw", "-r", "-b", address, "-p", str(PORT), *options]
    with Process([*argv, directory / "disk"], directory / f"server-{address}.log") as process:
        process.wait_for_line("serving ''")
        yield content


def uri(name: str, scheme: str = "nbd") -> str:
    """Where the server is said to be."""
    return f"{scheme}://{name}:{PORT}/"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("dead-first.example", LIVE_4),
        ("refused-first.example", LIVE_4),
        ("refused-first.example", LIVE_6),
        ("refused-far.example", LIVE_4),
        ("ipv6-only.example", LIVE_6),
    ],
)
@pytest.mark.sampled(1)
def test_every_address_of_a_name_is_tried(name: str, address: str, inside: list[str], tmp_path: Path) -> None:
    with serving(inside, tmp_path, address) as content:
        check(*inside, NBD_OVERLAY, "create", "--backing", uri(name), tmp_path / "made", seconds=9)
        assert json.loads(check(NBD_OVERLAY, "info", "--json", tmp_path / "made"))["virtual-size"] == MIB
        # The server of a proxy, and the source of an overlay.
        proxy: list[Argument] = [*inside, NBDSERVE, "-r", "-k", tmp_path / "proxy.sock", uri(name)]
        image = make_overlay(tmp_path / "overlay", "flat", MIB, uri(name))
        overlay: list[Argument] = [*inside, NBD_OVERLAY, "serve", image, "-k", tmp_path / "overlay.sock"]
        for kind, argv in {"proxy": proxy, "overlay": overlay}.items():
            with Process(argv, tmp_path / f"{kind}.log") as process:
                process.wait_for_line("serving ")
                read = tmp_path / f"{kind}.read"
                check("nbdcopy", f"nbd+unix:///?socket={tmp_path}/{kind}.sock", read, seconds=30)
                assert read.read_bytes() == content
                process.terminate()


@pytest.mark.exhaustive
def test_where_no_address_answers_each_is_named_in_time(inside: list[str], tmp_path: Path) -> None:
    """In less time than a system call takes to give up even one of them."""
    done = run(
        *inside, NBD_OVERLAY, "create", "--backing", uri("all-dead.example"), tmp_path / "x", seconds=25
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{DEAD_6}: no answer within 10 s" in line
    assert f"{DEAD_4}: no answer within 10 s" in line
    done = run(*inside, NBD_OVERLAY, "create", "--backing", uri("refused-first.example"), tmp_path / "x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{LIVE_6}: Connection refused; {LIVE_4}: Connection refused" in line


@pytest.mark.exhaustive
def test_a_name_that_nobody_looks_up_is_given_up_in_time(inside: list[str], tmp_path: Path) -> None:
    done = run(
        *inside, NBD_OVERLAY, "create", "--backing", uri("unknown.example"), tmp_path / "x", seconds=25
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the name 'unknown.example' could not be looked up in time" in line


def test_the_certificate_must_have_the_name_whichever_address_answers(
    inside: list[str], identities: Identities, tmp_path: Path
) -> None:
    tls = ["--tls-require", f"--tls-certificates={identities.server}"]
    probe = [*inside, sys.executable, "-c", PROBE]
    with serving(inside, tmp_path, "127.0.0.1", *tls):
        good = f"{uri('localhost', 'nbds')}?tls-certificates={identities.nobody}"
        assert check(*probe, good, seconds=20) == f"{MIB}\n"
        distrustful = f"{uri('localhost', 'nbds')}?tls-certificates={identities.distrustful}"
        assert "ConnectError" in run(*probe, distrustful, seconds=20).stderr
    with serving(inside, tmp_path, LIVE_4, *tls):
        # Its certificate is for localhost, and nothing else.
        wrong = f"{uri('dead-first.example', 'nbds')}?tls-certificates={identities.nobody}"
        done = run(*probe, wrong, seconds=20)
        assert done.returncode != 0
        assert "ConnectError" in done.stderr
        assert "certificate" in done.stderr.lower()


PROBE = """
import sys
from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
with connect(parse_uri(sys.argv[1])) as client:
    print(len(client.read(0, client.size)))
"""
