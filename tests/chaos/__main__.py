"""``python -m tests.chaos [OPTIONS] [ROUNDS [SEED]]``: faults in every migration, several at a time.

Each round moves a real guest while a schedule of faults strikes (schedules.py): processes are killed and
stopped, the link between the hosts is dropped, held, delayed and cut, B's disk is full, A's cannot be read.
How the guest is moved, what strikes and when is drawn from the seed and the round's number alone, so that
``--only ROUND`` plays one again. Whatever happens, the guest must be on one side and work, or have ended with
its QEMU that was killed; what the operator is told to type must bring the migration to its end; the disks
must hold what was there and the last that the guest has written; no process may be left that nobody needs.
"""

import sys

from tests.chaos.rounds import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
