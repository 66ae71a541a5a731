#!/bin/bash
# Step 4 of 5, on host A: migrate the running guest. QEMU itself starts what serves its disk; when this succeeds the
# guest runs on B, and nothing more is to be done on A.
#
#     DISK=/var/lib/images/vm.raw SOURCE_QMP=/run/vm/a.qmp CONNECT=192.0.2.2:10810 TOKEN_FILE=/etc/nbd.token \
#         CERTIFICATES=/etc/pki/nbd recipes/channel/4-migrate.sh
#
# DISK             the guest's disk on A, a raw image (absolute path), which this QEMU may read
# NAME             what it is called in the channel, as in step 1 (default disk)
# SOURCE_QMP       monitor of the guest's QEMU: a socket's absolute path, or HOST:PORT
# CONNECT          where step 2 listens: HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]/PATH
# TOKEN_FILE       the secret of step 2, with which A proves that it is A
# CERTIFICATES     directory with ca-cert.pem, client-cert.pem and client-key.pem
# LOG              where A's end of the channel logs (default: DISK with .channel.log added)
# MIGRATE_TIMEOUT  seconds that the RAM may take (default 3600)
#
# If it fails or is interrupted, the guest goes on here, on A. When the guest has left, A's QEMU is ended, so that the
# guest never runs here, too. Its end of the channel serves the disk until step 5 is done, keeps every other QEMU from
# writing to it meanwhile, and ends by itself. If it is killed, the command that it leaves in LOG.resume starts it again.

set -euo pipefail
. "$(dirname "$0")/../common.sh"
. "$(dirname "$0")/../leaving.sh"

help_or_go_on "$@"
NAME=${NAME:-disk}
MIGRATE_TIMEOUT=${MIGRATE_TIMEOUT:-3600}
need SOURCE_QMP CONNECT
need_absolute DISK TOKEN_FILE
LOG=${LOG:-$DISK.channel.log}
need_absolute LOG
need_number MIGRATE_TIMEOUT
need_programs nbd-migrate nbdserve

qmp() { nbd-migrate qmp "$SOURCE_QMP" "$@"; }

# why_failed: what A's end of the channel said last; QEMU only knows that its child has ended.
why_failed() {
    qmp query-migrate --get status >/dev/null 2>&1 || return
    tail -n 1 "$LOG" 2>/dev/null || true
}

has_gone() {
    downtime=$(qmp query-migrate --get downtime)
    qmp quit >/dev/null || die "the guest runs on B, but A's QEMU cannot be ended: never 'cont' here"
}

require_running
if ! { : >>"$LOG" && : >"$LOG.resume"; } 2>/dev/null; then
    die "LOG: $LOG and $LOG.resume cannot be written"
fi
complaints=$(mktemp)
trap 'rm -f -- "$complaints"' EXIT
command=$(printf '%q ' "$(command -v nbdserve)" channel --connect "$CONNECT" --export "$NAME=$DISK,format=raw" \
    --token-file "$TOKEN_FILE" ${CERTIFICATES:+--tls-certificates "$CERTIFICATES"})
echo "$command--resume" >"$LOG.resume"
started="$command--log $(printf %q "$LOG")"
started=${started//\\/\\\\}
leave "exec:${started//\"/\\\"}" "$MIGRATE_TIMEOUT"
echo "$me: the guest runs on B; it stood still for $downtime ms"
