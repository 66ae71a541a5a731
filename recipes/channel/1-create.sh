#!/bin/bash
# Step 1 of 5, on host B: create the overlay, an empty disk whose backing is what will migrate here.
#
#     OVERLAY=/var/lib/images/vm.raw SIZE=20G recipes/channel/1-create.sh
#
# OVERLAY  the image to create (absolute path); it must not exist yet
# SIZE     the size of the disk on A, in bytes or with K, M, G, T: qemu-img info --force-share tells it there
# NAME     what the disk is called in the channel (default disk)
# OWNER    USER or USER:GROUP whose the image is to be (default: not changed)
#
# Nothing is connected to. A wrong size is found when A connects: then the migration fails, and the guest goes on there.

set -euo pipefail
. "$(dirname "$0")/../common.sh"

help_or_go_on "$@"
NAME=${NAME:-disk}
need SIZE
need_absolute OVERLAY
need_programs nbd-overlay
exec nbd-overlay create --backing "migrate:$NAME" --size "$SIZE" ${OWNER:+--owner "$OWNER"} "$OVERLAY"
