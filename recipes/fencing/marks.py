"""What this host knows of images whose guest has moved: for checks that are made from another host.

nbd-migrate marks IMAGE...     prints a JSON object: for each that is not to be used, why
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nbdserve.common import program
from nbdserve.common.errors import ImageError
from nbdserve.exports.moved_images import refuse_moved


def main(arguments: Sequence[str]) -> int:
    """Print why images are not to be used; return an exit code."""
    found = {}
    for image in arguments:
        try:
            refuse_moved(Path(image))
        except ImageError as error:
            found[image] = str(error)
    print(json.dumps(found))
    return program.EXIT_DONE


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1:])))
