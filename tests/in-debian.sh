#!/usr/bin/env bash
# Run a command in a copy of this tree on another release of Debian, on this machine:
#
#     tests/in-debian.sh trixie make test
#
# The release is installed by debootstrap, once, into nbd-migrate/debian-RELEASE of the user's cache directory, from
# where this machine's apt gets its packages. What runs there has its own mounts, processes and network, which is
# nothing but a loopback interface, and all of it ends with this script. Needs root.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
tree=/srv/nbd-migrate

fail() {
    echo "in-debian.sh: $*" >&2
    exit 1
}

# "URI RELEASE COMPONENT" of what apt uses here, with this release's name in place of the other's.
repositories() {
    # shellcheck disable=SC2016  # the names are apt's
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
        sed "s/ $(. /etc/os-release && echo "$VERSION_CODENAME")/ $release/" | sort -u
}

bootstrap() {
    local mirror
    command -v debootstrap >/dev/null || fail "debootstrap is not installed"
    mirror=$(repositories | awk -v release="$release" '$2 == release { print $1; exit }')
    [ -n "$mirror" ] || fail "apt knows no mirror of Debian here; run 'apt-get update'"
    rm -rf "$root.new"
    debootstrap --variant=minbase --include=ca-certificates,make "$release" "$root.new" "$mirror" >"$root.log" 2>&1 ||
        fail "debootstrap failed, see $root.log: $(tail -n 1 "$root.log")"
    mv "$root.new" "$root"
}

# How this machine reaches its repositories: proxies, certificates, names.
configure() {
    repositories | sed 's/^/deb /' >"$root/etc/apt/sources.list"
    apt-config dump --no-empty Acquire | grep -v '::IndexTargets' >"$root/etc/apt/apt.conf.d/90in-debian"
    cp -a /etc/apt/auth.conf* "$root/etc/apt/" 2>/dev/null || true
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    cp -a /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
    chroot "$root" update-ca-certificates >/dev/null 2>&1 || fail "update-ca-certificates failed in $root"
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
}

# The files of this tree as they are now; what make has installed there is kept.
copy_tree() {
    mkdir -p "$root$tree"
    find "$root$tree" -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -rf {} +
    cd "$here"
    git -c safe.directory="$here" ls-files -z --cached --others --exclude-standard --deduplicate |
        while IFS= read -r -d "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done |
        tar -c --null --no-recursion -T - | tar -x --no-same-owner -C "$root$tree"
}

# inside [--net] COMMAND...: run it as the first process of its own, in the new root; --net without a network.
enter() {
    local options=(--mount --pid --fork --kill-child --propagation private)
    if [ "$1" = --net ]; then
        options+=(--net)
        shift
    fi
    unshare "${options[@]}" -- "$0" --inside "$root" "$@"
}

inside() {
    local kept=() name
    root=$1
    shift
    ip link set lo up
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    cd "$root"
    mkdir -p .old
    pivot_root . .old
    umount -l .old
    for name in $(compgen -e | grep -iE '^(pip_|ssl_cert|requests_ca|(https?|no|all)_proxy$)' || true); do
        kept+=("$name=${!name}")
    done
    cd "$tree"
    # Bash is the first process there, as somebody has to take leave of those that nobody waits for.
    exec env -i "${kept[@]}" HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        bash -c '"$@"; exit $?' bash "$@"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
fi
[ $# -ge 2 ] || fail "give RELEASE COMMAND..., such as: trixie make test"
[ "$(id -u)" = 0 ] || fail "needs root"
release=$1
shift
root=${XDG_CACHE_HOME:-$HOME/.cache}/nbd-migrate/debian-$release
mkdir -p "$(dirname "$root")"
exec 9>"$root.lock"
flock -n 9 || { echo "in-debian.sh: waiting for another run on $release" >&2 && flock 9; }
[ -d "$root" ] || bootstrap
configure
find "$root/tmp" -mindepth 1 -xdev -delete
copy_tree
enter make setup
# Some tests look into the history.
enter sh -c 'rm -rf .git && git init -q && git add -A &&
    git -c user.name=nobody -c user.email=nobody@example.org commit -qm "A copy"'
enter .venv/bin/python -c 'from recipes.demo.kernel import fetch; fetch()'
enter --net "$@"
