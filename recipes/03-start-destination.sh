#!/bin/bash
# Step 3, on host B: start the QEMU that is to receive the guest, with the overlay, copy-on-read, and no CPU running.
#
#     OVERLAY=/var/lib/images/vm.qed NBD_ADDRESS=192.0.2.1 MIGRATION=tcp:192.0.2.2:4444 \
#     DESTINATION_QMP=/run/vm/b.qmp recipes/03-start-destination.sh \
#         qemu-system-x86_64 -m 2G ... -device virtio-blk-pci,drive=disk0,rerror=stop,werror=stop
#
# The arguments are the guest's QEMU command line, as on A, but without its disk's -blockdev or -drive: that is
# added here under the name NODE. With rerror=stop and werror=stop the guest waits, and reads nothing wrong, when
# A cannot be reached.
#
# OVERLAY               the image of step 2 (absolute path)
# NBD_ADDRESS           where A serves the disk
# NBD_PORT              TCP port (default 10809)
# NBD_NAME              name of the export (default disk)
# NODE                  block node that the -device of the disk refers to (default disk0)
# DESTINATION_QMP       monitor socket that this QEMU gets (absolute path)
# DESTINATION_PID_FILE  where it leaves its process id (default: DESTINATION_QMP with .pid added)
# DESTINATION_LOG       where it writes what goes wrong (default: DESTINATION_QMP with .log added)
# MIGRATION             where it waits for the guest's RAM: tcp:ADDRESS:PORT or unix:/PATH
# RECONNECT_DELAY       seconds for which it holds a read while A cannot be reached (default 10)

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
NBD_PORT=${NBD_PORT:-10809}
NBD_NAME=${NBD_NAME:-disk}
NODE=${NODE:-disk0}
RECONNECT_DELAY=${RECONNECT_DELAY:-10}
need NBD_ADDRESS MIGRATION
need_absolute OVERLAY DESTINATION_QMP
DESTINATION_PID_FILE=${DESTINATION_PID_FILE:-$DESTINATION_QMP.pid}
DESTINATION_LOG=${DESTINATION_LOG:-$DESTINATION_QMP.log}
need_absolute DESTINATION_PID_FILE DESTINATION_LOG
need_number NBD_PORT RECONNECT_DELAY
[ $# -gt 0 ] || die "give the guest's QEMU command line as arguments (see $me --help)" 2
need_programs "$1" nbd-migrate
[ -f "$OVERLAY" ] || die "OVERLAY: there is no $OVERLAY; run step 2"
# Another QEMU there may carry the guest already: it is not to be touched.
nobody_at "$DESTINATION_QMP" || die "DESTINATION_QMP: a QEMU listens at $DESTINATION_QMP already; nothing was done"
if [ -s "$DESTINATION_PID_FILE" ] && [ -e "/proc/$(cat "$DESTINATION_PID_FILE")" ]; then
    die "DESTINATION_PID_FILE: process $(cat "$DESTINATION_PID_FILE") of $DESTINATION_PID_FILE runs; nothing was done"
fi
rm -f "$DESTINATION_PID_FILE"

export="driver=nbd,server.type=inet,server.host=$NBD_ADDRESS,server.port=$NBD_PORT,export=${NBD_NAME//,/,,}"
export="$export,reconnect-delay=$RECONNECT_DELAY,open-timeout=$RECONNECT_DELAY"
# A QEMU that is a daemon writes its errors only to a log of -D, and only if -d asks for something.
if ! why=$(timeout 60 "$@" \
    -blockdev "node-name=$NODE-export,read-only=on,$export" \
    -blockdev "node-name=$NODE-backing,read-only=on,driver=raw,file=$NODE-export" \
    -blockdev "node-name=$NODE-overlay,driver=qed,file.driver=file,file.filename=${OVERLAY//,/,,},backing=$NODE-backing" \
    -blockdev "node-name=$NODE,driver=copy-on-read,file=$NODE-overlay" \
    -incoming defer \
    -qmp "unix:${DESTINATION_QMP//,/,,},server=on,wait=off" \
    -D "$DESTINATION_LOG" -d unimp -daemonize -pidfile "$DESTINATION_PID_FILE" 2>&1); then
    # A QEMU that hangs while it opens the export is already a daemon.
    [ ! -s "$DESTINATION_PID_FILE" ] || kill "$(cat "$DESTINATION_PID_FILE")" 2>/dev/null || true
    why=${why:-$(tail -n 1 "$DESTINATION_LOG")}
    die "B's QEMU did not start, and the guest runs on, on A: ${why##*$'\n'}"
fi

qmp() { nbd-migrate qmp "$DESTINATION_QMP" "$@" >/dev/null; }

# It has no guest yet: one that cannot wait for it must not be in the next one's way.
if ! why=$(qmp migrate-set-capabilities "$(capabilities events return-path)" 2>&1 &&
    qmp migrate-incoming "{\"uri\": \"$MIGRATION\"}" 2>&1); then
    qmp quit 2>/dev/null || true
    die "B's QEMU was ended, as it cannot wait for the guest, which runs on, on A: ${why##*$'\n'}"
fi
echo "$me: process $(cat "$DESTINATION_PID_FILE") waits for the guest at $MIGRATION; what goes wrong there stands in $DESTINATION_LOG"
