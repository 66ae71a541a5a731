"""Where a host can be reached by another: a small program that runs there, and prints JSON.

Its arguments are an address of the other host and a port; it tells the address that this host has towards
that one, and the first port from this one on at which nobody listens.
"""

from __future__ import annotations

import json
import socket
import sys

from nbdserve.common import program
from nbdserve.common.errors import ConnectError, OperatorError

PORTS = 1000
"""How many ports are tried."""


def local_address(other: str) -> str:
    """Return the address from which this host sends to another; nothing is sent."""
    try:
        [(family, _, _, _, target), *_] = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            name = probe.getsockname()
    except UnicodeError as error:
        raise ConnectError(f"there is no route to {other!r}, which is no name of a host") from error
    except OSError as error:
        raise ConnectError(f"there is no route to {other}: {error.strerror or error}") from error
    host = str(name[0])
    if family == socket.AF_INET6 and name[3] and "%" not in host:
        return f"{host}%{socket.if_indextoname(name[3])}"
    return host


def free_port(address: str, first: int) -> int:
    """Return the first TCP port of this address, from ``first`` on, that can be listened at."""
    last: OSError | None = None
    for port in range(first, min(first + PORTS, 65536)):
        try:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family[0], socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(family[4])
            return port
        except OSError as error:
            last = error
    raise OperatorError(f"no port of {address} is free from {first} on: {last and last.strerror}")


def main(other: str, first: int) -> int:
    """Print what was found as JSON."""
    address = local_address(other)
    print(json.dumps({"address": address, "port": free_port(address, first)}))
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1], int(sys.argv[2]))))
