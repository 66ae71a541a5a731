#!/bin/bash
# Step 5 of 5, on host B: copy every block that is not here yet, while the guest runs. Then A is told that it is needed
# no more, its end of the channel ends by itself, and B's QEMU takes the disk as a plain raw file.
#
#     OVERLAY=/var/lib/images/vm.raw DESTINATION_QMP=/run/vm/b.qmp recipes/channel/5-stream.sh
#
# OVERLAY          the image of step 1 (absolute path), which step 2 serves
# DESTINATION_QMP  monitor of B's QEMU: a socket's absolute path, or HOST:PORT
# NODE             block node of the disk, as in step 3 (default disk0)
# SPEED            bytes per second to copy at most (default 0, no limit)
#
# While A cannot be reached, copying pauses, and the guest too as soon as it needs what is not here yet; nothing is
# lost, and both go on when A's end is back. It may be run again.

set -euo pipefail
. "$(dirname "$0")/../common.sh"

help_or_go_on "$@"
NODE=${NODE:-disk0}
SPEED=${SPEED:-0}
need DESTINATION_QMP
need_absolute OVERLAY
need_programs nbd-overlay nbd-migrate
control=unix:$OVERLAY.qmp
[ -S "$OVERLAY.qmp" ] || die "OVERLAY: nobody serves $OVERLAY; run step 2"

# Where it is under way already, it goes on.
said=$(nbd-overlay stream --qmp "$control" --speed "$SPEED" 2>&1) || [[ $said = *" is busy: "* ]] || die "$said"
nbd-overlay wait --qmp "$control"
# Nothing of A is needed any more, also where it is gone for good.
nbd-overlay channel-done --qmp "$control" ||
    echo "$me: every block is here, and this goes on without A; its end of the channel, if it is there, is to be ended by hand" >&2
nbd-migrate pivot --qmp "$DESTINATION_QMP" --node "$NODE" "$OVERLAY"
nbd-overlay quit --qmp "$control"
