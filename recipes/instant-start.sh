#!/bin/bash
# Instant start, without a migration: a guest boots at once from a remote template, while its disk fills behind it.
#
#     recipes/instant-start.sh nbd://192.0.2.1/template /var/lib/images/vm.raw -- -m 2G -accel kvm -nographic
#
# The first argument is where the template is served (nbdserve -r), the second the guest's own disk, which is made if
# it is not there; what follows -- are more options for QEMU. What the guest reads and what the stream copies is kept
# there, and the template is never written to. When the disk is complete the guest pivots to the file, a plain raw
# disk. Run again, this goes on where it was; a complete disk needs no template any more.
#
# QEMU         QEMU's command (default qemu-system-x86_64)
# DEVICE       what the guest sees, without drive= (default virtio-blk-pci)
# SPEED        bytes per second to copy at most (default 0, no limit)
# CONNECTIONS  to the template's server (default 4)
#
# It runs as long as QEMU does, with QEMU's exit code. Ctrl-C and SIGTERM end QEMU, and nothing is lost that the guest
# had flushed.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
QEMU=${QEMU:-qemu-system-x86_64}
DEVICE=${DEVICE:-virtio-blk-pci}
SPEED=${SPEED:-0}
CONNECTIONS=${CONNECTIONS:-4}
need_number SPEED CONNECTIONS
if [ $# -lt 2 ] || [ "${3:---}" != -- ]; then
    die "give BACKING-URI IMAGE [-- QEMU options] (see $me --help)" 2
fi
backing=$1 image=$(realpath -m -- "$2")
shift $(($# > 2 ? 3 : 2))
need_programs "$QEMU" nbd-overlay nbd-migrate timeout

guest=("$QEMU" -device "$DEVICE,drive=disk0,rerror=stop,werror=stop" "$@")
if [ ! -e "$image" ]; then
    timeout 30 nbd-overlay create --backing "$backing" "$image" >/dev/null
elif [ ! -e "$image.map" ]; then
    # One that has lost its map is no whole disk, and is refused here.
    facts=$(timeout 30 nbd-overlay info --json "$image")
    [[ $facts = *'"format": "raw"'* ]] || die "$image looks like no raw disk; choose another name"
    echo "$me: $image is complete, and needs no template"
    exec "${guest[@]}" -blockdev "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=${image//,/,,}"
fi

# A private place for the sockets, which are gone with QEMU.
place=$(mktemp -d "${XDG_RUNTIME_DIR:-/tmp}/instant-start.XXXXXX")
control=unix:$place/overlay
daemon='' machine='' filler=''

gone() { ! kill -0 "$1" 2>/dev/null; }

# clean_up: end what there is, QEMU first, so that its guest's writes are kept.
# shellcheck disable=SC2317,SC2329 # it is a trap
clean_up() {
    trap '' INT TERM HUP
    local process
    for process in $filler $machine $daemon; do
        kill "$process" 2>/dev/null || continue
        await 60 "process $process does not end" gone "$process"
    done
    rm -rf -- "$place"
}
trap clean_up EXIT

# fill: when every block is here the guest takes the file. Until then a template that cannot be reached is a pause.
fill() {
    local why
    until why=$(nbd-overlay wait --qmp "$control" 2>&1 >/dev/null); do
        ! gone "$daemon" || return 0
        echo "$me: ${why##*$'\n'}; trying again" >&2
        sleep 5
        nbd-overlay resume --qmp "$control" >/dev/null 2>&1 || true
        [ "$(nbd-migrate qmp "$place/qemu" query-status --get status 2>/dev/null)" != io-error ] ||
            nbd-migrate qmp "$place/qemu" cont >/dev/null 2>&1 || true
    done
    # Where the guest has ended meanwhile, the next start uses the file.
    nbd-migrate pivot --qmp "$place/qemu" --node disk0 "$image" >/dev/null 2>&1 || return 0
    kill "$daemon"
    echo "$me: $image is complete, and the guest uses it; the template is not needed any more"
}

timeout 60 nbd-overlay serve "$image" --layout flat --backing "$backing" --socket "$place/nbd" --qmp "$control" --simple-replies \
    --stream --speed "$SPEED" --connections "$CONNECTIONS" --daemonize --pid-file "$place/pid"
daemon=$(cat "$place/pid")
# QEMU keeps our standard input, for a console there.
"${guest[@]}" \
    -blockdev "driver=nbd,node-name=disk0,discard=unmap,server.type=unix,server.path=$place/nbd,reconnect-delay=1" \
    -qmp "unix:$place/qemu,server=on,wait=off" <&0 &
machine=$!
trap 'kill "$machine" 2>/dev/null' INT TERM HUP
fill &
filler=$!
echo "$me: to watch: nbd-overlay status --watch --qmp $control"
status=0
wait "$machine" || status=$?
# A signal interrupts the wait, and QEMU's end is still to come.
until gone "$machine"; do
    status=0
    wait "$machine" || status=$?
done
machine=''
exit "$status"
