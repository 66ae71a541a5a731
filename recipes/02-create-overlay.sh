#!/bin/bash
# Step 2, on host B: create the overlay, an empty QED image whose backing is the export of step 1.
#
#     OVERLAY=/var/lib/images/vm.qed NBD_ADDRESS=192.0.2.1 recipes/02-create-overlay.sh
#
# OVERLAY   the image to create (absolute path); it must not exist yet
# NBD_ADDRESS  where A serves the disk
# NBD_PORT  TCP port (default 10809)
# NBD_NAME  name of the export (default disk)
# OWNER     USER or USER:GROUP whose the image is to be, as of a QEMU that another user starts (default: not changed)
#
# The overlay gets the size of the export. A server that offers structured replies is refused: QEMU 7.2 and 10.0 store
# garbage when such a server fails while it copies.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_PORT=${NBD_PORT:-10809}
NBD_NAME=${NBD_NAME:-disk}
need NBD_ADDRESS
need_absolute OVERLAY
need_number NBD_PORT
need_programs nbd-overlay nbdinfo timeout
[ ! -e "$OVERLAY" ] || die "OVERLAY: $OVERLAY exists; remove it, or choose another name"

uri=$(nbd_uri "$NBD_ADDRESS" "$NBD_PORT" "$NBD_NAME")
answer=0
timeout 20 nbdinfo --can structured-reply "$uri" 2>/dev/null || answer=$?
case $answer in
2) ;; # it cannot
0) die "$uri offers structured replies; serve the disk with step 1" ;;
*) die "$uri cannot be reached; run step 1" ;;
esac
nbd-overlay create --layout qed --backing "$uri" ${OWNER:+--owner "$OWNER"} "$OVERLAY"
echo "$me: $OVERLAY is created, its backing is $uri"
