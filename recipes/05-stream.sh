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
# While A cannot be reached, copying pauses, and the guest too as soon as it needs what is not local yet; nothing
# is lost. Bring A's server back (step 1): this recipe, which may also be run again, resumes both.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NODE=${NODE:-disk0}
SPEED=${SPEED:-0}
STALL_TIMEOUT=${STALL_TIMEOUT:-300}
need DESTINATION_QMP
need_number SPEED STALL_TIMEOUT
need_programs nbd-migrate

# B's QEMU may be silent while it waits for A to come back.
qmp() { nbd-migrate qmp "$DESTINATION_QMP" "$@" --timeout 60; }

# jobs PATH: what query-jobs says there.
jobs() { qmp query-jobs --get "$1"; }

# nodes PATH: what query-named-block-nodes says there.
nodes() { qmp query-named-block-nodes '{"flat": true}' --get "$1"; }

# guest_runs: whether the guest runs; one that an I/O error has stopped is told to go on.
guest_runs() {
    guest=$(qmp query-status --get status) || exit
    [ "$guest" = running ] || ! qmp cont >/dev/null
}

qmp query-status --get status --until 'running|paused|io-error' >/dev/null

# start_stream: start the job; where every block is local already it has nothing to do.
start_stream() {
    qmp block-stream "{\"job-id\": \"stream\", \"device\": \"$NODE-overlay\", \"speed\": $SPEED,
        \"on-error\": \"stop\", \"auto-dismiss\": false}" >/dev/null
}

last='' since=$SECONDS
while :; do
    # A job of nbd-migrate run dismisses itself: another one then tells whether every block is local.
    known=$(jobs '*')
    if [[ $known != *'"id": "stream"'* ]]; then
        start_stream
        continue
    fi
    status=$(jobs stream.status 2>/dev/null) || continue
    [ "$status" != concluded ] || break
    # What an I/O error has stopped goes on, or stops again as long as A is away.
    guest_runs || true
    [ "$status" != paused ] || qmp block-job-resume '{"device": "stream"}' >/dev/null 2>&1 || continue
    now=$(jobs stream.current-progress 2>/dev/null) || continue
    total=$(jobs stream.total-progress 2>/dev/null) || continue
    echo "$me: $((now >> 20)) of $((total >> 20)) MiB, job $status, guest $guest"
    [ "$now" = "$last" ] || since=$SECONDS
    [ $((SECONDS - since)) -lt "$STALL_TIMEOUT" ] ||
        die "no progress for $STALL_TIMEOUT s; see to the server of step 1, then run this recipe again"
    last=$now
    sleep 1
done

error=$(jobs stream.error)
qmp job-dismiss '{"id": "stream"}' >/dev/null
[ -z "$error" ] || die "streaming failed: $error; see to the server of step 1, then run this recipe again"
await 60 "every block is local, but the guest does not run on B" guest_runs
# A is needed until B's copy would also survive a power failure.
sync -- "$(nodes "$NODE-overlay.file")" || die "run this recipe again, on host B"
drivers=$(nodes '*.drv')
if grep -qx nbd <<<"$drivers"; then
    qmp blockdev-del "{\"node-name\": \"$NODE-backing\"}" >/dev/null
    qmp blockdev-del "{\"node-name\": \"$NODE-export\"}" >/dev/null
fi
echo "$me: every block is local and the export of step 1 is closed"
