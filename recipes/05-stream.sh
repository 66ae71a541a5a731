#!/bin/bash
# Step 5, on host B: copy every block that is not in the overlay yet, while the guest runs. Then A is not needed.
#
#     DESTINATION_QMP=/run/vm/b.qmp recipes/05-stream.sh
#     DESTINATION_QMP=ended OVERLAY=/var/lib/images/vm.qed recipes/05-stream.sh
#
# DESTINATION_QMP  monitor of B's QEMU: a socket's absolute path, or HOST:PORT; "ended" when it has ended, as when
#                  its guest was switched off
# NODE             block node of the disk, as in step 3 (default disk0)
# OVERLAY          the image of step 2 (absolute path), where B's QEMU has ended: then nbd-overlay copies
# XDG_RUNTIME_DIR  where that has its sockets meanwhile (default /tmp)
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
OVERLAY=${OVERLAY:-}
need DESTINATION_QMP
need_number SPEED STALL_TIMEOUT
need_programs nbd-migrate

# complete_without_guest: what QEMU did not copy before it ended nbd-overlay does.
complete_without_guest() {
    need_absolute OVERLAY
    need_programs nbd-overlay timeout
    [ -f "$OVERLAY" ] || die "OVERLAY: there is no $OVERLAY on this host"
    place=$(mktemp -d "${XDG_RUNTIME_DIR:-/tmp}/stream.XXXXXX")
    # shellcheck disable=SC2154 # it is set here
    trap 'process=$(cat "$place/pid" 2>/dev/null) || true
        ! carries "$process" "unix:$place/qmp" || kill "$process" 2>/dev/null || true
        rm -rf -- "$place"' EXIT
    trap 'exit 1' INT TERM HUP
    timeout 60 nbd-overlay serve "$OVERLAY" --layout qed --socket "$place/nbd" --qmp "unix:$place/qmp" \
        --stream --speed "$SPEED" --daemonize --pid-file "$place/pid"
    nbd-overlay wait --qmp "unix:$place/qmp" ||
        die "see to the server of step 1, then run this recipe again"
    nbd-overlay quit --qmp "unix:$place/qmp"
    echo "$me: every block is local in $OVERLAY, and nothing needs the export of step 1"
    exit
}

[ "$DESTINATION_QMP" != ended ] || complete_without_guest

# B's QEMU may be silent while it waits for A to come back.
qmp() { nbd-migrate qmp "$DESTINATION_QMP" "$@" --timeout 60; }

# jobs PATH: what query-jobs says there.
jobs() { qmp query-jobs --get "$1"; }

# nodes PATH: what query-named-block-nodes says there.
nodes() { qmp query-named-block-nodes '{"flat": true}' --get "$1"; }

# guest_runs: whether the guest runs, or is off; one that an I/O error has stopped is told to go on.
guest_runs() {
    guest=$(qmp query-status --get status) || exit
    [[ $guest = running || $guest = shutdown ]] || ! qmp cont >/dev/null
}

if ! why=$(qmp query-status --get status --until 'running|paused|io-error|shutdown' 2>&1 >/dev/null); then
    ! nobody_at "$DESTINATION_QMP" || why="$why; where B's QEMU has ended, set DESTINATION_QMP=ended and OVERLAY"
    die "${why#nbd-migrate: }"
fi
driver=$(nodes "$NODE.drv" 2>/dev/null) || die "NODE: B's QEMU has no block node $NODE"
socket=$(nodes "$NODE-socket.drv" 2>/dev/null) || socket=
[[ $driver != nbd && $socket != nbd ]] ||
    die "NODE: $NODE is served by nbd-overlay, which copies: finish that with nbd-migrate finish and the run's plan"

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
