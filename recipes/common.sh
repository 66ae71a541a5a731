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

# nobody_at MONITOR: whether no QEMU listens there. One that does not answer is busy, or stopped, but it is there.
nobody_at() {
    local why
    ! why=$(nbd-migrate qmp "$1" query-status --timeout 5 2>&1) && [[ $why = *"no monitor at $1: "* ]]
}

# await SECONDS WHAT COMMAND...: wait until the command succeeds.
await() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt "$end" ] || die "$what"
        sleep 0.2
    done
}
