#!/bin/bash
# Step 3 of 5, on host B: start the QEMU that is to receive the guest, with the overlay as its disk.
#
#     OVERLAY=/var/lib/images/vm.raw DESTINATION_QMP=/run/vm/b.qmp recipes/channel/3-start-destination.sh \
#         qemu-system-x86_64 -m 2G ... -device virtio-blk-pci,drive=disk0,rerror=stop,werror=stop
#
# The arguments are the guest's QEMU command line, as on A, but without its disk's -blockdev or -drive: that is added
# here under the name NODE.
#
# OVERLAY          the image of step 1 (absolute path), which step 2 serves
# NODE             block node that the -device of the disk refers to (default disk0)
# DESTINATION_QMP  monitor socket that this QEMU gets (absolute path); its process id is in a file beside it, .pid
#
# It goes on in the background, and waits for the guest at OVERLAY.incoming, to which step 2 passes on what comes.

set -euo pipefail
. "$(dirname "$0")/../common.sh"

help_or_go_on "$@"
NODE=${NODE:-disk0}
need_absolute OVERLAY DESTINATION_QMP
[ $# -gt 0 ] || die "give the guest's QEMU command line as arguments (see $me --help)" 2
need_programs "$1"
[ -S "$OVERLAY.nbd" ] || die "OVERLAY: nobody serves $OVERLAY at $OVERLAY.nbd; run step 2"
exec "$@" \
    -blockdev "driver=nbd,node-name=$NODE-socket,server.type=unix,server.path=${OVERLAY//,/,,}.nbd,reconnect-delay=60,open-timeout=20" \
    -blockdev "driver=raw,node-name=$NODE,file=$NODE-socket" \
    -incoming "unix:$OVERLAY.incoming" \
    -qmp "unix:${DESTINATION_QMP//,/,,},server=on,wait=off" \
    -daemonize -pidfile "$DESTINATION_QMP.pid"
