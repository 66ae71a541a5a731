#!/bin/bash
# Step 5, on host B: copy every block that is not in the overlay yet, while the guest runs. Then A is not needed.
#
#     DESTINATION_QMP=/run/vm/b.qmp recipes/05-stream.sh
#
# DESTINATION_QMP  monitor of B's QEMU: a socket's absolute path, or HOST:PORT
# NODE             block node of the disk, as in step 3 (default disk0)
# SPEED            bytes per second to copy at most (default 0, no limit)
# STALL_TIMEOUT    seconds without any progress after which to give up waiting (default 300)
#
# If A cannot be reached, the guest stands still or goes on with what is local, and this recipe says so and ends.
# Bring A's server back (step 1) and run it again: it resumes the guest and copies what is missing.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NODE=${NODE:-disk0}
SPEED=${SPEED:-0}
STALL_TIMEOUT=${STALL_TIMEOUT:-300}
need DESTINATION_QMP
need_number SPEED STALL_TIMEOUT
need_programs nbd-migrate

qmp() { nbd-migrate qmp "$DESTINATION_QMP" "$@"; }

# resume: let the guest run, also after it was stopped by a read that failed.
resume() {
    local status
    for _ in {1..10}; do
        status=$(qmp query-status --get status)
        case $status in
        running) return ;;
        inmigrate | finish-migrate) ;;
        *) qmp cont >/dev/null ;;
        esac
        sleep 1
    done
    die "the guest does not run on B but is in state $status; is the server of step 1 there?"
}

# jobs PATH: what query-jobs knows there.
jobs() { qmp query-jobs --get "$1"; }

# needs_a: whether B's QEMU still has the export of step 1 open.
needs_a() {
    local drivers
    drivers=$(qmp query-named-block-nodes '{"flat": true}' --get '*.drv')
    grep -qx nbd <<<"$drivers"
}

resume
if ! grep -qx stream <<<"$(jobs '*.id')"; then
    qmp block-stream "{\"job-id\": \"stream\", \"device\": \"$NODE-overlay\", \"speed\": $SPEED,
        \"auto-dismiss\": false}" >/dev/null
fi

last='' since=$SECONDS
while status=$(jobs stream.status) && [ "$status" != concluded ]; do
    resume
    now=$(jobs stream.current-progress)
    echo "$me: $((now >> 20)) of $(($(jobs stream.total-progress) >> 20)) MiB ($status)"
    [ "$now" = "$last" ] || since=$SECONDS
    [ $((SECONDS - since)) -lt "$STALL_TIMEOUT" ] || die "no progress for $STALL_TIMEOUT s; the job goes on by itself"
    last=$now
    sleep 1
done

error=$(jobs stream.error)
qmp job-dismiss '{"id": "stream"}' >/dev/null
[ -z "$error" ] || die "streaming stopped: $error; see to the server of step 1, then run this recipe again"
if needs_a; then
    qmp blockdev-del "{\"node-name\": \"$NODE-backing\"}" >/dev/null
    qmp blockdev-del "{\"node-name\": \"$NODE-export\"}" >/dev/null
fi
echo "$me: every block is local and the export of step 1 is closed"
