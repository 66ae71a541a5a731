"""A host that is cut off is noticed although no server could be waited for any shorter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import Argument, Process
from tests.support.servers import NBDSERVE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

NETWORK = """
setpriv --pdeathsig KILL unshare --net sleep 600 & far=$!
until [ "$(readlink /proc/$far/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 netns $far
ip address add 192.0.2.1/24 dev v0
nsenter --net -t $far sh -c 'ip link set lo up; ip link set v1 up; ip address add 192.0.2.2/24 dev v1'
echo "far $far"; exec sleep 600
"""

READER = """
import sys, time
from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
client = connect(parse_uri("nbd://192.0.2.2:10809/"), silence=3600.0)
print(len(client.read(0, client.size)), flush=True)
sys.stdin.readline()
try:
    if sys.argv[1] == "reads":
        client.read(0, 512)
    while client.connected:
        time.sleep(0.1)
except OSError as error:
    print(error, flush=True)
print("noticed", flush=True)
"""


@pytest.mark.parametrize("does", ["reads", "waits"])
@pytest.mark.exhaustive
def test_a_host_that_is_cut_off_is_noticed_by_who_asks_and_by_who_does_not(does: str, tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", MIB)
    with Process(["unshare", "--net", "sh", "-ec", NETWORK], tmp_path / "network.log") as network:
        network.wait_for_line("far ")
        near = ["nsenter", "--net", "-t", str(network.pid)]
        far = ["nsenter", "--net", "-t", network.output().split()[-1]]
        serve: list[Argument] = [*far, NBDSERVE, "-f", "raw", "-r", "-b", "192.0.2.2", tmp_path / "disk"]
        (tmp_path / "go").touch()
        with Process(serve, tmp_path / "server.log") as server:
            server.wait_for_line("serving ''")
            fifo = tmp_path / "fifo"
            os.mkfifo(fifo)
            read = ["sh", "-c", f'exec "$@" <{fifo}', "sh", *near, sys.executable, "-c", READER, does]
            with Process(read, tmp_path / "reader.log") as reader:
                with fifo.open("w") as go:
                    reader.wait_for_line(str(MIB))
                    with Process([*far, "ip", "link", "set", "v1", "down"], tmp_path / "cut.log") as cut:
                        assert cut.wait() == 0
                    go.write("\n")
                # Twenty seconds and a bit, where a system by itself takes a quarter of an hour.
                reader.wait_for_line("noticed", 40.0)
                if does == "reads":
                    assert "its host has acknowledged nothing for 20 s" in reader.output()
