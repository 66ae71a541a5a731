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
# If it fails, the guest goes on here, on A. Afterwards A's end serves the disk, also when A's QEMU has ended, until
# step 5 is done, and ends by itself. If it is killed, the command that it leaves in LOG.resume starts it again.
# Never "cont" here, when the guest is on B.

set -euo pipefail
. "$(dirname "$0")/../common.sh"

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

command=$(printf '%q ' "$(command -v nbdserve)" channel --connect "$CONNECT" --export "$NAME=$DISK,format=raw" \
    --token-file "$TOKEN_FILE" ${CERTIFICATES:+--tls-certificates "$CERTIFICATES"})
started="$command--log $(printf %q "$LOG")"
state=$(qmp query-status --get status)
[ "$state" = running ] || die "the guest is in state $state, not running; nothing was done"
echo "$command--resume" >"$LOG.resume"
# Without the return path nobody would know when B has all of the guest.
qmp migrate-set-capabilities "$(capabilities events return-path)" >/dev/null
started=${started//\\/\\\\}
qmp migrate "{\"uri\": \"exec:${started//\"/\\\"}\"}" >/dev/null ||
    die "the guest runs on here, on A; see $LOG"
why=$(qmp query-migrate --get status --until completed --unless 'failed|cancelled' --timeout "$MIGRATE_TIMEOUT" 2>&1) || {
    state=$(qmp query-migrate --get status 2>/dev/null) || die "A's QEMU does not answer any more: $why"
    [[ $state = @(failed|cancelled) ]] ||
        die "the migration is $state, and goes on; migrate_cancel gives the guest back as long as it is active"
    die "the guest runs on here, on A: $(tail -n 1 "$LOG")"
}
echo "$me: the guest runs on B; it stood still for $(qmp query-migrate --get downtime) ms"
