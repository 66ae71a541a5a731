"""An operator who never rests: exports come and go, clients are thrown out, metrics are read."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tests.soak.clients import Quota
from tests.support.monitors import Qmp, monitor
from tests.support.servers import Address, TcpAddress
from tests.support.wire import Command, Wire, request

_ROUNDS = 10
"""How often exports come and go before the operator connects anew."""


@dataclass
class Operator:
    """Works at the monitor with an image that is nobody else's."""

    socket: Path
    address: Address
    image: Path
    pause: float = 0.02

    def work(self, quota: Quota) -> None:
        """Until the quota is used up by others."""
        while quota.open:
            with monitor(self.socket) as qmp:
                for number in range(_ROUNDS):
                    self._add_and_remove(qmp, f"guest-{number}")
                    time.sleep(self.pause)

    def _add_and_remove(self, qmp: Qmp, name: str) -> None:
        qmp.execute(
            "block-export-add", type_="nbd", id=name, filename=str(self.image), writable=True, format="raw"
        )
        with Wire(self.address, 60) as wire, Wire(self.address, 60) as thrown_out:
            wire.go(name)
            wire.send(request(Command.WRITE, 0, data=name.encode()), request(Command.READ, 0, 512))
            thrown_out.go(name)
            # Once it is answered it is known to use the export.
            thrown_out.send(request(Command.READ, 0, 512))
            thrown_out.simple_reply()
            thrown_out.receive(512)
            clients = qmp.execute("x-query-clients")
            number = max(client["id"] for client in clients if client["export"] == name)
            qmp.execute("x-disconnect-client", id=number)
            assert thrown_out.is_closed_by_server()
            qmp.execute("query-block-exports")
            qmp.execute("block-export-del", id=name, mode="hard")
        while qmp.event()["event"] != "BLOCK_EXPORT_DELETED":
            pass


@dataclass
class Scraper:
    """Reads the metrics, as Prometheus does, but more often."""

    address: TcpAddress
    pause: float = 0.2

    def work(self, quota: Quota) -> None:
        """Until the quota is used up by others."""
        while quota.open:
            self.requests()
            time.sleep(self.pause)

    def requests(self) -> int:
        """The requests that the server has counted, of all exports that it has now."""
        return int(sum(self._values("nbdserve_requests_total")))

    def connections(self) -> int:
        """Clients in transmission, or on the way there."""
        return int(sum(self._values("nbdserve_connections")) + sum(self._values("nbdserve_handshakes")))

    def _values(self, name: str) -> list[float]:
        with urllib.request.urlopen(
            f"http://{self.address.host}:{self.address.port}/metrics", timeout=10
        ) as page:
            lines = page.read().decode().splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " "))]
