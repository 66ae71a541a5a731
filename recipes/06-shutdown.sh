#!/bin/bash
# Step 6, on host A: when B needs nothing any more, end A's QEMU and the server, and put the old disk out of reach.
#
#     DISK=/var/lib/images/vm.raw SOURCE_QMP=/run/vm/a.qmp DESTINATION_QMP=/run/vm/b.qmp recipes/06-shutdown.sh
#
# DISK             the disk that step 1 serves (absolute path)
# NBD_NAME         name of its export (default disk)
# NBD_PID_FILE     the server's process id, from step 1 (default /run/nbd-migrate-NBD_NAME.pid)
# FENCE_FILE       the fence's process id, from step 4 (default /run/nbd-migrate-NBD_NAME.fence)
# SOURCE_QMP       monitor of A's QEMU: a socket's absolute path, or HOST:PORT; "ended" when it has ended already
# DESTINATION_QMP  monitor of B's QEMU; from another host for example by ssh -L /run/vm/b.qmp:/run/vm/b.qmp HOST
# MOVE_TO          where to move the disk in the end, so that nobody starts the old guest (default: it stays)
#
# B is asked first, and unless the guest runs there without the export, nothing is ended here.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_NAME=${NBD_NAME:-disk}
NBD_PID_FILE=${NBD_PID_FILE:-/run/nbd-migrate-$NBD_NAME.pid}
FENCE_FILE=${FENCE_FILE:-/run/nbd-migrate-$NBD_NAME.fence}
MOVE_TO=${MOVE_TO:-}
need SOURCE_QMP DESTINATION_QMP
need_absolute DISK NBD_PID_FILE FENCE_FILE
need_programs nbd-migrate
if [ -n "$MOVE_TO" ]; then
    need_absolute MOVE_TO
    [ -f "$DISK" ] || die "DISK: $DISK is not a file, so it cannot be moved" 2
    [ ! -e "$MOVE_TO" ] || die "MOVE_TO: $MOVE_TO exists; choose another name" 2
fi

# ended PID: whether the process has ended; a zombie has.
ended() { ! grep -qs '^State:.[^Z]' "/proc/$1/status"; }

# end FILE PATTERN: end the process whose id is in FILE, if one word of its command line is PATTERN, and wait.
end() {
    local pid
    pid=$(cat "$1")
    ended "$pid" && return
    grep -qszE "$2" "/proc/$pid/cmdline" || die "$1: process $pid is another program; see to it yourself"
    kill "$pid"
    await 30 "process $pid of $1 does not end" ended "$pid"
}

# Is anything here still needed?
status=$(nbd-migrate qmp "$DESTINATION_QMP" query-status --get status)
[ "$status" = running ] || die "the guest does not run on B but is in state $status; nothing was ended"
drivers=$(nbd-migrate qmp "$DESTINATION_QMP" query-named-block-nodes '{"flat": true}' --get '*.drv')
! grep -qx nbd <<<"$drivers" || die "B still uses the export: run step 5 to its end; nothing was ended"
[ -s "$NBD_PID_FILE" ] || die "NBD_PID_FILE: there is no $NBD_PID_FILE; was step 1 run here?"
[ -s "$FENCE_FILE" ] || die "FENCE_FILE: there is no $FENCE_FILE; was step 4 run here?"

# The fence falls only when A's QEMU has ended and its disk is out of reach.
if [ "$SOURCE_QMP" != ended ]; then
    status=$(nbd-migrate qmp "$SOURCE_QMP" query-status --get status)
    [ "$status" = postmigrate ] || die "A's guest is in state $status and not migrated away; nothing was ended"
    nbd-migrate qmp "$SOURCE_QMP" quit >/dev/null
    await 30 "A's QEMU does not end" nobody_at "$SOURCE_QMP"
fi
[ -z "$MOVE_TO" ] || mv -n "$DISK" "$MOVE_TO"
end "$NBD_PID_FILE" '^(.*/)?nbdserve$'
end "$FENCE_FILE" '^((.*/)?nbd-migrate|recipes\.fence)$'
echo "$me: A's QEMU and the server have ended${MOVE_TO:+, $DISK is now $MOVE_TO}"
