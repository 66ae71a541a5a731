"""What a host sees of an export: ``nbd-migrate probe URI`` prints one JSON object.

It is run on B, before QEMU there connects to A, as only B can tell whether B reaches the export.
"""

from __future__ import annotations

import json
import sys

from nbdserve.common import program
from nbdserve.common.uri import parse_uri


def probe(uri: str) -> int:
    """Print the export's size in bytes, and whether it can be written to and offers structured replies.

    Raises UsageError for what is not an NBD URI, ConnectError when nobody answers there.
    """
    from nbdserve import client

    with client.connect(parse_uri(uri)) as connection:
        export = connection.export
    facts = {
        "size": export.size,
        "read-only": export.read_only,
        "structured-replies": export.structured_replies,
    }
    print(json.dumps(facts))
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: probe(sys.argv[1])))
