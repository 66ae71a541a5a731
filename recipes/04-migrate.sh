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
. "$(dirname "$0")/leaving.sh"

help_or_go_on "$@"
NBD_NAME=${NBD_NAME:-disk}
MIGRATE_TIMEOUT=${MIGRATE_TIMEOUT:-3600}
FENCE_FILE=${FENCE_FILE:-/run/nbd-migrate-$NBD_NAME.fence}
need SOURCE_QMP MIGRATION
need_absolute DISK FENCE_FILE
need_number MIGRATE_TIMEOUT
need_programs nbd-migrate setsid
# The fence needs it later only.
complaints=$FENCE_FILE.log

qmp() { nbd-migrate qmp "$SOURCE_QMP" "$@"; }

why_failed() { qmp query-migrate --get error-desc 2>/dev/null; }

# has_gone: from now on nobody writes to DISK here. Where that fails, A's QEMU is ended instead.
has_gone() {
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

require_running
if [ -s "$FENCE_FILE" ] && [ -e "/proc/$(cat "$FENCE_FILE")" ]; then
    die "FENCE_FILE: process $(cat "$FENCE_FILE") of $FENCE_FILE runs; is that a fence of another migration?"
fi
if ! { rm -f "$FENCE_FILE" && : >"$FENCE_FILE.log"; } 2>/dev/null; then
    die "FENCE_FILE: $FENCE_FILE cannot be written"
fi
leave "$MIGRATION" "$MIGRATE_TIMEOUT"
echo "$me: the guest runs on B; it stood still for $(qmp query-migrate --get downtime) ms"
