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
# DESTINATION_QMP  monitor of B's QEMU; from another host for example by ssh -L /run/vm/b.qmp:/run/vm/b.qmp HOST;
#                  "ended" when it has ended and step 5 has completed its disk
# MOVE_TO          where to move the disk in the end, so that nobody starts the old guest (default: it stays)
#
# B is asked first, and unless the guest is there without the export, nothing is ended here, nor while the server has
# clients. A server or a fence that has ended already is no obstacle.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_NAME=${NBD_NAME:-disk}
NBD_PID_FILE=${NBD_PID_FILE:-/run/nbd-migrate-$NBD_NAME.pid}
FENCE_FILE=${FENCE_FILE:-/run/nbd-migrate-$NBD_NAME.fence}
MOVE_TO=${MOVE_TO:-}
need SOURCE_QMP DESTINATION_QMP
need_absolute DISK NBD_PID_FILE FENCE_FILE
need_programs nbd-migrate awk
# Who has run nbd-migrate finds the disk where that has put it out of reach.
now=$DISK
[ ! -e "$DISK.moved" ] || now=$DISK.moved
if [ -n "$MOVE_TO" ]; then
    need_absolute MOVE_TO
    [ -f "$now" ] || die "DISK: $DISK is not a file, so it cannot be moved" 2
    [ ! -e "$MOVE_TO" ] || die "MOVE_TO: $MOVE_TO exists; choose another name" 2
fi

# ended PID: whether the process has ended; a zombie has.
ended() { ! grep -qs '^State:.[^Z]' "/proc/$1/status"; }

# end FILE PATTERN: end the process whose id is in FILE, if one word of its command line is PATTERN, and wait.
end() {
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    ended "$pid" && return
    grep -qszE "$2" "/proc/$pid/cmdline" || die "$1: process $pid is another program; see to it yourself"
    kill "$pid" 2>/dev/null || ended "$pid" || die "$1: process $pid cannot be ended from here"
    await 30 "process $pid of $1 does not end" ended "$pid"
}

# need_no_other FILE PATTERN VARIABLE: of the processes with DISK and PATTERN in their command lines none must run but
# the one whose id is in FILE. A supervisor, which nbd-migrate leaves beside each, has its command line, and ends with it.
need_no_other() {
    local directory pid known
    known=$(cat "$1" 2>/dev/null) || true
    for directory in /proc/[0-9]*; do
        pid=${directory#/proc/}
        [ "$pid" != "$known" ] || continue
        ! grep -qszE '^(supervisor|recipes\.processes\.supervisor)$' "$directory/cmdline" || continue
        if carries "$pid" "$DISK" && grep -qszE "$2" "$directory/cmdline" && ! ended "$pid"; then
            die "$3: process $pid is not that of $1, but works with $DISK; end it (kill $pid); nothing was ended"
        fi
    done
}

# has_clients PID: whether the process has accepted connections that are open.
has_clients() {
    local link inode
    for link in "/proc/$1/fd/"*; do
        inode=$(readlink "$link") || continue
        [[ $inode = socket:* ]] || continue
        inode=${inode//[!0-9]/}
        # The states ESTABLISHED, of TCP, and CONNECTED, of a Unix socket for streams that has a name. A kernel may be
        # without IPv6.
        { cat "/proc/$1/net/"{tcp,tcp6,unix} 2>/dev/null || true; } |
            awk -v inode="$inode" '($10 == inode && $4 == "01") || ($7 == inode && $6 == "03" && NF > 7) {
                found = 1 } END { exit !found }' && return
    done
    return 1
}

has_no_clients() { ! has_clients "$1"; }

nbdserve='^(.*/)?nbdserve$' fence='^((.*/)?nbd-migrate|recipes\.([a-z]+\.)?fence)$'

# Is anything here still needed?
if [ "$DESTINATION_QMP" != ended ]; then
    status=$(nbd-migrate qmp "$DESTINATION_QMP" query-status --get status)
    [[ $status = running || $status = shutdown ]] ||
        die "the guest does not run on B but is in state $status; nothing was ended"
    drivers=$(nbd-migrate qmp "$DESTINATION_QMP" query-named-block-nodes '{"flat": true}' --get '*.drv')
    ! grep -qx nbd <<<"$drivers" || die "B still uses the export: run step 5 to its end; nothing was ended"
fi
need_no_other "$NBD_PID_FILE" "$nbdserve" NBD_PID_FILE
need_no_other "$FENCE_FILE" "$fence" FENCE_FILE
if [ -s "$NBD_PID_FILE" ] && ! ended "$(cat "$NBD_PID_FILE")"; then
    await 10 "the server still has clients: let step 5 come to its end on B; nothing was ended" \
        has_no_clients "$(cat "$NBD_PID_FILE")"
fi

# The fence falls only when A's QEMU has ended and its disk is out of reach.
if [ "$SOURCE_QMP" != ended ]; then
    status=$(nbd-migrate qmp "$SOURCE_QMP" query-status --get status)
    [ "$status" = postmigrate ] || die "A's guest is in state $status and not migrated away; nothing was ended"
    nbd-migrate qmp "$SOURCE_QMP" quit >/dev/null
    await 30 "A's QEMU does not end" nobody_at "$SOURCE_QMP"
fi
if [ -n "$MOVE_TO" ]; then
    mv -n "$now" "$MOVE_TO"
    rm -f "$DISK.moved.json"
fi
end "$NBD_PID_FILE" "$nbdserve"
end "$FENCE_FILE" "$fence"
echo "$me: A's QEMU and the server have ended${MOVE_TO:+, $DISK is now $MOVE_TO}"
