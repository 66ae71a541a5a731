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
# nbd-overlay, which has the disk until then, is started again when it ends, and the guest waits meanwhile.
#
# QEMU         QEMU's command (default qemu-system-x86_64)
# DEVICE       what the guest sees, without drive= (default virtio-blk-pci)
# SPEED        bytes per second to copy at most (default 0, no limit)
# CONNECTIONS  to the template's server (default: nbd-overlay's)
# RESTARTS     how often in ten minutes an nbd-overlay that has ended is started again (default 5)
# OWNER        USER or USER:GROUP whose the disk is when it is made, and its socket: of a QEMU that becomes another user
# LAYOUT       "flat": IMAGE is a complete raw disk, even if it begins like a QED image with a backing
#
# It runs as long as QEMU does, with QEMU's exit code. Ctrl-C and SIGTERM end QEMU, and nothing is lost that the guest
# had flushed.

set -euo pipefail
. "$(dirname "$0")/common.sh"

help_or_go_on "$@"
QEMU=${QEMU:-qemu-system-x86_64}
DEVICE=${DEVICE:-virtio-blk-pci}
SPEED=${SPEED:-0}
RESTARTS=${RESTARTS:-5}
need_number SPEED RESTARTS
connections=() disk_owner=() socket_owner=()
if [ -n "${CONNECTIONS:-}" ]; then
    need_number CONNECTIONS
    connections=(--connections "$CONNECTIONS")
fi
if [ -n "${OWNER:-}" ]; then
    disk_owner=(--owner "$OWNER") socket_owner=(--socket-owner "$OWNER")
fi
if [ $# -lt 2 ] || [ "${3:---}" != -- ]; then
    die "give BACKING-URI IMAGE [-- QEMU options] (see $me --help)" 2
fi
backing=$1 image=$(realpath -m -- "$2")
shift $(($# > 2 ? 3 : 2))
need_programs "$QEMU" nbd-overlay nbd-migrate timeout

guest=("$QEMU" -device "$DEVICE,drive=disk0,rerror=stop,werror=stop" "$@")
if [ ! -e "$image" ]; then
    timeout 30 nbd-overlay create --backing "$backing" "${disk_owner[@]}" "$image" >/dev/null
elif [ ! -e "$image.map" ]; then
    # One that has lost its map is no whole disk, and is refused here. What a whole one begins with is the guest's.
    timeout 30 nbd-overlay info --layout flat "$image" >/dev/null
    if [ "${LAYOUT:-}" != flat ] && facts=$(timeout 30 nbd-overlay info --json "$image" 2>/dev/null) &&
        [[ $facts = *'"format": "qed"'*'"backing-filename"'* ]]; then
        die "$image is a QED overlay; choose another name, or say LAYOUT=flat if it is a guest's whole disk"
    fi
    echo "$me: $image is complete, and needs no template"
    exec "${guest[@]}" -blockdev "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=${image//,/,,}"
fi

# A private place for the sockets, whose paths must be short. They are gone with QEMU.
place=${XDG_RUNTIME_DIR:-/tmp}
[ ${#place} -le 75 ] || place=/tmp
if [ -n "${OWNER:-}" ] && [[ $(stat -L -c %A -- "$place") != *[xt] ]]; then
    place=/tmp
fi
place=$(mktemp -d "$place/instant-start.XXXXXX")
[ -z "${OWNER:-}" ] || chmod 711 "$place"
control=unix:$place/overlay
machine='' filler=''

gone() { ! runs "$1"; }

# daemon: the process id of the nbd-overlay of the day; nothing when there is none.
daemon() {
    local process
    process=$(cat "$place/pid" 2>/dev/null) || return 0
    ! carries "$process" "$control" || echo "$process"
}

# has_ended: whether nbd-overlay has; one that has hung up does so a moment later.
has_ended() {
    for _ in $(seq 10); do
        [ -n "$(daemon)" ] || return 0
        sleep 0.1
    done
    return 1
}

# shellcheck disable=SC2317,SC2329 # await calls it
daemon_has_ended() { [ -z "$(daemon)" ]; }

# qmp COMMAND...: ask the guest's QEMU.
qmp() { nbd-migrate qmp "$place/qemu" "$@" 2>/dev/null; }

# clean_up: end what there is, QEMU first, so that its guest's writes are kept.
# shellcheck disable=SC2317,SC2329 # it is a trap
clean_up() {
    trap '' INT TERM HUP
    local process
    for process in $filler $machine; do
        end_child "$process"
        await 90 "process $process does not end" gone "$process"
    done
    # Nobody starts another one any more.
    process=$(daemon)
    if [ -n "$process" ] && kill "$process" 2>/dev/null; then
        await 60 "process $process does not end" daemon_has_ended
    fi
    rm -rf -- "$place"
}
trap clean_up EXIT

# serve: start nbd-overlay; a disk that is complete by now has no backing any more.
serve() {
    local template=()
    [ ! -e "$image.map" ] || template=(--backing "$backing")
    timeout 60 nbd-overlay serve "$image" --layout flat "${template[@]}" --socket "$place/nbd" "${socket_owner[@]}" --qmp "$control" \
        --simple-replies --stream --speed "$SPEED" "${connections[@]}" --daemonize --pid-file "$place/pid" \
        2>"$place/why"
}

# why: what has failed last, in one line.
why() {
    local line
    line=$(tail -n 1 "$place/why")
    echo "${line:-nbd-overlay has ended before it was ready}"
}

# revive: start nbd-overlay again, and the guest too where it has waited too long; fails when that was done too often.
revive() {
    local now=$SECONDS each recent=()
    for each in "${revived[@]}"; do
        [ $((now - each)) -gt 600 ] || recent+=("$each")
    done
    if [ ${#recent[@]} -ge "$RESTARTS" ]; then
        echo "$me: nbd-overlay has ended too often; the guest waits, and loses nothing: end it, look into the system's log," \
            "and start it again" >&2
        return 1
    fi
    revived=("${recent[@]}" "$now")
    echo "$me: nbd-overlay has ended; it is started again, and the guest waits meanwhile" >&2
    if ! serve; then
        echo "$me: $(why)" >&2
        return 0
    fi
    # What QEMU has held for too long is an error by then, and QEMU connects again only now and then.
    [ -z "$nurse" ] || end_child "$nurse"
    for _ in $(seq 15); do
        go_on
        sleep 2
    done &
    nurse=$!
}

# go_on: a guest that an error has stopped goes on, or stops again.
go_on() {
    [ "$(qmp query-status --get status)" != io-error ] || qmp cont >/dev/null || true
}

# fill: when every block is here the guest takes the file. Until then a template that cannot be reached is a pause.
fill() {
    local revived=() waiter='' nurse='' process each
    trap 'for each in $waiter $nurse; do end_child "$each"; done; exit 0' TERM
    while :; do
        # Not in the foreground, where the shell would see no signal before the end.
        nbd-overlay wait --qmp "$control" >/dev/null 2>"$place/why" &
        waiter=$!
        if wait "$waiter"; then
            # Where the guest has ended meanwhile, the next start uses the file.
            if nbd-migrate pivot --qmp "$place/qemu" --node disk0 "$image" >/dev/null 2>"$place/why"; then
                [ -z "$nurse" ] || end_child "$nurse"
                # It may have ended by itself in this moment.
                process=$(daemon)
                [ -z "$process" ] || kill "$process" 2>/dev/null || true
                echo "$me: $image is complete, and the guest uses it; the template is not needed any more"
                return 0
            fi
        fi
        if has_ended; then
            revive && continue
            [ -z "$nurse" ] || end_child "$nurse"
            return 0
        fi
        # A QEMU that has not come up yet, or is about to end, is no trouble.
        ! qmp query-status >/dev/null || echo "$me: $(why); trying again" >&2
        sleep 5 &
        wait $! || true
        nbd-overlay resume --qmp "$control" >/dev/null 2>&1 || true
        go_on
    done
}

# Once more, as one may be killed before it is ready, too.
serve || serve || die "$(why)"
fill &
filler=$!
# QEMU keeps our standard input, for a console there.
"${guest[@]}" \
    -blockdev "driver=nbd,node-name=disk0-socket,discard=unmap,server.type=unix,server.path=$place/nbd,reconnect-delay=20,open-timeout=20" \
    -blockdev "driver=raw,node-name=disk0,discard=unmap,file=disk0-socket" \
    -qmp "unix:$place/qemu,server=on,wait=off" <&0 &
machine=$!
trap 'end_child "$machine"' INT TERM HUP
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
