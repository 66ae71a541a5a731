# shellcheck shell=bash
# What the recipes share by which a guest leaves A: waits that can be interrupted, and the way back. It is read by them,
# not run. They set SOURCE_QMP and `complaints`, a file for what commands complain of, and define
#
#   qmp           a command of A's monitor
#   has_gone      the guest has left: see that it does not run here, too
#   why_failed    print why the migration failed, if that is known

waiter='' cause='' continued=''

# waiting: qmp in the background, as the shell does not see a signal before a command in the foreground has ended.
waiting() {
    # shellcheck disable=SC2154 # it is the recipe's
    nbd-migrate qmp "$SOURCE_QMP" "$@" >/dev/null 2>"$complaints" &
    waiter=$!
    # In short turns, as a signal that comes just before a wait begins is not seen before that ends.
    while runs "$waiter"; do
        sleep 0.2 &
        wait $! || true
    done
    wait "$waiter"
}

# require_running: end with one line unless the guest runs here, and no migration of it is under way.
require_running() {
    local status
    status=$(qmp query-status --get status)
    if [ "$(qmp query-migrate --get status)" = pre-switchover ]; then
        die "the guest stands still before the switch-over of a migration that nobody continues; it goes on with: \
nbd-migrate qmp $SOURCE_QMP migrate_cancel; nothing was done"
    fi
    [ "$status" = running ] ||
        die "the guest is in state $status, not running; nothing was done (migrate_cancel and cont take back a half migration)"
}

# leave URI SECONDS: migrate, with the RAM in so many seconds; what fails, or is interrupted, is taken back.
leave() {
    # Without the return path A reports success even if B could not load the guest.
    qmp migrate-set-capabilities "$(capabilities events return-path pause-before-switchover)" >/dev/null
    trap 'cause=interrupted; give_up' INT TERM HUP
    qmp migrate "{\"uri\": \"$1\"}" >/dev/null
    waiting query-migrate --get status --until pre-switchover --unless 'failed|cancelled' --timeout "$2" || give_up
    continued=yes
    # Not by the function: what the trap says while it runs would go where its output goes.
    nbd-migrate qmp "$SOURCE_QMP" migrate-continue '{"state": "pre-switchover"}' >/dev/null 2>"$complaints" || give_up
    waiting query-migrate --get status --until completed --unless 'failed|cancelled' --timeout 300 || give_up
    # Nothing may come between the guest's leaving and this.
    trap '' INT TERM HUP
    has_gone
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
        has_gone
        die "interrupted, but the guest had arrived: it runs on B"
    fi
    why=$(why_failed) || die "A's QEMU does not answer any more"
    why=${cause:-${why:-$(tail -n 1 "$complaints")}}
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
