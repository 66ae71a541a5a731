#!/bin/bash
# Step 1, on host A: serve the disk of the running guest, read-only, over NBD.
#
#     DISK=/var/lib/images/vm.raw NBD_ADDRESS=192.0.2.1 recipes/01-export.sh
#
# DISK          the guest's disk, a raw image (absolute path)
# NBD_ADDRESS      address to listen on, by which B reaches A
# NBD_PORT      TCP port (default 10809)
# NBD_NAME      name of the export (default disk)
# NBD_PID_FILE  where the server leaves its process id (default /run/nbd-migrate-NBD_NAME.pid)
#
# The server offers no structured replies, as QEMU (7.2, 10.0) stores garbage when such a server fails while it copies.
# The running guest is not disturbed. Step 6 ends the server.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_PORT=${NBD_PORT:-10809}
NBD_NAME=${NBD_NAME:-disk}
NBD_PID_FILE=${NBD_PID_FILE:-/run/nbd-migrate-$NBD_NAME.pid}
need NBD_ADDRESS
need_absolute DISK NBD_PID_FILE
need_number NBD_PORT
need_programs nbdserve
! [ -e "$DISK.moved.json" ] || die "DISK: the guest of $DISK has moved: see $DISK.moved.json"
[ -f "$DISK" ] || [ -b "$DISK" ] || die "DISK: $DISK is neither a file nor a block device"

nbdserve --read-only --format raw --simple-replies \
    --bind "$NBD_ADDRESS" --port "$NBD_PORT" --export-name "$NBD_NAME" \
    --fork --pid-file "$NBD_PID_FILE" "$DISK"
echo "$me: $DISK is served as $(nbd_uri "$NBD_ADDRESS" "$NBD_PORT" "$NBD_NAME") by process $(cat "$NBD_PID_FILE")"
