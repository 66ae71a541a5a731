#!/bin/bash
# Step 4, on host A: migrate the running guest's RAM to B. When this succeeds, the guest runs on B.
#
#     DISK=/var/lib/images/vm.raw SOURCE_QMP=/run/vm/a.qmp MIGRATION=tcp:192.0.2.2:4444 recipes/04-migrate.sh
#
# DISK             the guest's disk on A, as in step 1 (absolute path)
# NBD_NAME         name of its export (default disk)
# SOURCE_QMP       monitor of the guest's QEMU: a socket's absolute path, or HOST:PORT
# MIGRATION        where B waits, as in step 3
# MIGRATE_TIMEOUT  seconds that the RAM may take (default 3600)
# FENCE_FILE       where the fence leaves its process id (default /run/nbd-migrate-NBD_NAME.fence)
#
# If the RAM takes too long, or B fails, the migration is cancelled and the guest goes on here, on A.
# When the guest has left, a fence is raised: a process that holds QEMU's image locks, so that `cont` fails here.
# Not earlier, as a QEMU 7.2 that cannot take its own disk back aborts. Step 6 ends the fence.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_NAME=${NBD_NAME:-disk}
MIGRATE_TIMEOUT=${MIGRATE_TIMEOUT:-3600}
FENCE_FILE=${FENCE_FILE:-/run/nbd-migrate-$NBD_NAME.fence}
need SOURCE_QMP MIGRATION
need_absolute DISK FENCE_FILE
need_number MIGRATE_TIMEOUT
need_programs nbd-migrate setsid

qmp() { nbd-migrate qmp "$SOURCE_QMP" "$@"; }

# waiting: qmp in the background, as the shell does not see a signal before a command in the foreground has ended.
# What it complains of stands in FENCE_FILE.log, which the fence needs later only.
waiting() {
    nbd-migrate qmp "$SOURCE_QMP" "$@" >/dev/null 2>"$FENCE_FILE.log" &
    waiter=$!
    # In short turns, as a signal that comes just before a wait begins is not seen before that ends.
    while runs "$waiter"; do
        sleep 0.2 &
        wait $! || true
    done
    wait "$waiter"
}
waiter='' cause='' continued=''

# raise_fence: from now on nobody writes to DISK here. Where that fails, A's QEMU is ended instead.
raise_fence() {
    setsid nbd-migrate fence "$FENCE_FILE" "$DISK" </dev/null >"$FENCE_FILE.log" 2>&1 &
    fence=$!
    for _ in $(seq 50); do
        [ "$(cat "$FENCE_FILE" 2>/dev/null)" != "$fence" ] || return 0
        runs "$fence" || break
        sleep 0.2
    done
    qmp quit >/dev/null || die "the guest runs on B, but there is no fence: never 'cont' here; see $FENCE_FILE.log"
    die "the guest runs on B, but there is no fence, so A's QEMU was ended; see $FENCE_FILE.log"
}

# await_end_of_switch_over: cancelled now it could run twice, as B's QEMU may have all of the guest already. It comes to
# an end by itself: on B, or, when B's QEMU ends, here.
await_end_of_switch_over() {
    # For an instant it may not have begun yet.
    qmp query-migrate --get status --until 'device|completed|failed|cancelled' --timeout 5 >/dev/null 2>&1 || true
    qmp query-migrate --get status --until 'pre-switchover|completed|failed|cancelled' --timeout 60 >/dev/null 2>&1 ||
        die "the switch-over hangs, and B's QEMU may have the guest: end that one, if it does not run, and the guest goes on \
here by itself; do not cancel or 'cont' here"
}

# has_left: whether the guest has; "completed" alone is also what a guest that came here by a migration keeps.
has_left() {
    [ "$(qmp query-migrate --get status)" = completed ] && [[ $(qmp query-status --get status) = @(postmigrate|finish-migrate) ]]
}

# give_up: after a failure, cancel what is under way and say where the guest is.
give_up() {
    local why
    trap '' INT TERM HUP
    [ -z "$waiter" ] || end_child "$waiter"
    [ -z "$continued" ] || await_end_of_switch_over
    if has_left; then
        raise_fence
        die "interrupted, but the guest had arrived: it runs on B"
    fi
    why=$(qmp query-migrate --get error-desc 2>/dev/null) || die "A's QEMU does not answer any more"
    why=${cause:-${why:-$(tail -n 1 "$FENCE_FILE.log")}}
    qmp migrate_cancel >/dev/null
    # Where it had not begun yet there is none, or an older one. A QEMU that was told so in the instant in which it stops
    # the guest for the switch-over would stand in "cancelling" for ever.
    [ -z "$(qmp query-migrate --get status)" ] ||
        qmp query-migrate --get status --until 'cancelled|failed|completed' --timeout 2 >/dev/null 2>&1 ||
        qmp migrate-continue '{"state": "cancelling"}' >/dev/null 2>&1 ||
        true
    [ -z "$(qmp query-migrate --get status)" ] ||
        qmp query-migrate --get status --until 'cancelled|failed|completed' --timeout 30 >/dev/null || true
    if qmp query-status --get status --until running --timeout 5 >/dev/null 2>&1; then
        die "the guest runs on here, on A, as the migration failed: $why"
    fi
    die "the guest is paused here, on A, and 'cont' resumes it; the migration failed: $why"
}

status=$(qmp query-status --get status)
if [ "$(qmp query-migrate --get status)" = pre-switchover ]; then
    die "the guest stands still before the switch-over of a migration that nobody continues; it goes on with: \
nbd-migrate qmp $SOURCE_QMP migrate_cancel; nothing was done"
fi
[ "$status" = running ] ||
    die "the guest is in state $status, not running; nothing was done (migrate_cancel and cont take back a half migration)"
if [ -s "$FENCE_FILE" ] && [ -e "/proc/$(cat "$FENCE_FILE")" ]; then
    die "FENCE_FILE: process $(cat "$FENCE_FILE") of $FENCE_FILE runs; is that a fence of another migration?"
fi
if ! { rm -f "$FENCE_FILE" && : >"$FENCE_FILE.log"; } 2>/dev/null; then
    die "FENCE_FILE: $FENCE_FILE cannot be written"
fi
# Without the return path A reports success even if B could not load the guest.
qmp migrate-set-capabilities "$(capabilities events return-path pause-before-switchover)" >/dev/null
trap 'cause=interrupted; give_up' INT TERM HUP
qmp migrate "{\"uri\": \"$MIGRATION\"}" >/dev/null
waiting query-migrate --get status --until pre-switchover --unless 'failed|cancelled' \
    --timeout "$MIGRATE_TIMEOUT" || give_up
continued=yes
# Not by the function: what the trap says while it runs would go where its output goes.
nbd-migrate qmp "$SOURCE_QMP" migrate-continue '{"state": "pre-switchover"}' >/dev/null 2>"$FENCE_FILE.log" || give_up
waiting query-migrate --get status --until completed --unless 'failed|cancelled' --timeout 300 || give_up
# Nothing may come between the guest's leaving and the fence.
trap '' INT TERM HUP
raise_fence
echo "$me: the guest runs on B; it stood still for $(qmp query-migrate --get downtime) ms"
