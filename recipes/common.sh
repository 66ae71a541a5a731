# shellcheck shell=bash
# What the six recipes share: --help, checks of variables, one-line errors. It is read by them, not run.

me=${0##*/}

# die MESSAGE [EXIT-CODE]: say what is wrong in one line and end.
die() {
    echo "$me: $1" >&2
    exit "${2:-1}"
}

# help_or_go_on "$@": print the recipe's head when --help is asked for.
help_or_go_on() {
    case ${1:-} in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    esac
}

# need VARIABLE...: end with one line unless each of these is set.
need() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || die "set $name (see $me --help)" 2
    done
}

# need_absolute VARIABLE...: end with one line unless each of these is an absolute path.
need_absolute() {
    local name
    need "$@"
    for name in "$@"; do
        [[ ${!name} = /* ]] || die "$name: '${!name}' must be an absolute path" 2
    done
}

# need_number VARIABLE...: end with one line unless each of these is a whole number.
need_number() {
    local name
    need "$@"
    for name in "$@"; do
        [[ ${!name} =~ ^[0-9]+$ ]] || die "$name: '${!name}' is not a whole number" 2
    done
}

# need_programs PROGRAM...: end with one line unless each can be run.
need_programs() {
    local name
    for name in "$@"; do
        command -v "$name" >/dev/null || die "there is no $name on this host's PATH; install the project"
    done
}

# nbd_uri ADDRESS PORT NAME: the URI of an export.
nbd_uri() {
    local host=$1 port=$2 name=$3
    [[ $host != *:* ]] || host="[${host/\%/%25}]"
    [[ $name =~ ^[A-Za-z0-9._~=/-]*$ ]] || name=$(printf %s "$name" | od -An -v -tx1 | tr -d '\n' | tr ' ' %)
    echo "nbd://$host:$port/$name"
}

# capabilities NAME...: the arguments of migrate-set-capabilities that switch these on.
capabilities() {
    local name list=''
    for name in "$@"; do
        list="$list${list:+, }{\"capability\": \"$name\", \"state\": true}"
    done
    echo "{\"capabilities\": [$list]}"
}

# nobody_at MONITOR: whether no QEMU listens there. One that does not answer is busy, or stopped, but it is there; one
# whose host cannot be reached may be.
nobody_at() {
    local why
    ! why=$(nbd-migrate qmp "$1" query-status --timeout 5 2>&1) && [[ $why = *"no monitor at $1: "@("Connection refused"|"No such file")* ]]
}

# runs PID: whether a child of this shell has not ended. The id of one that has may be another process's by now.
# The kernel is asked: after a signal that interrupts a wait, bash can have a child that has ended among its jobs for ever.
runs() {
    local parent=$BASHPID
    awk -v parent="$parent" '$1 == "State:" && $2 == "Z" { exit 1 } $1 == "PPid:" { exit $2 != parent }' \
        "/proc/$1/status" 2>/dev/null
}

# carries PID WORD: whether a process has this word in its command line; an id from a file may be another's by now.
carries() { grep -qszxF -- "$2" "/proc/$1/cmdline"; }

# end_child PID: let a child end, if it runs.
end_child() { ! runs "$1" || kill "$1" 2>/dev/null || true; }

# await SECONDS WHAT COMMAND...: wait until the command succeeds.
await() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt "$end" ] || die "$what"
        sleep 0.2
    done
}
