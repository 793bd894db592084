#!/bin/sh
# Installs what `make bench` needs beyond the laboratory: the peers that ours is compared with. Idempotent.
# What it keeps true: a peer that cannot be had is said here and shown as missing in the tables; it stops nothing,
# and neither `make test` nor `make demo` comes here.
set -eu

rublk=0.2.15 # the ublk server; bench/peers.py looks for .cache/bin/rublk-VERSION
packages="nbdkit nbd-client libnbd-bin valgrind fio make gcc"
build_packages="libclang-dev" # only for building rublk
cache=${CSI_VDUSE_CACHE:-$(cd "$(dirname "$0")/.." && pwd)/.cache}

installed() { dpkg-query -W -f '${db:Status-Abbrev}\n' "$1" 2>/dev/null | grep -q '^ii'; }
install() {
    wanted=
    for package in "$@"; do installed "$package" || wanted="$wanted $package"; done
    [ -n "$wanted" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "bench: missing packages, install them as root: apt-get install$wanted" >&2
        return 1
    fi
    echo "bench: installing$wanted"
    apt-get -qq update
    # shellcheck disable=SC2086  # the list is words
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $wanted >/dev/null
}

# shellcheck disable=SC2086
install $packages || echo "bench: some peers will be missing from the tables" >&2

target=$cache/bin/rublk-$rublk
if [ ! -x "$target" ]; then
    if ! command -v cargo >/dev/null; then
        echo "bench: no cargo, so no rublk: ublk will be missing from the tables" >&2
        exit 0
    fi
    # shellcheck disable=SC2086
    install $build_packages || exit 0
    echo "bench: building rublk $rublk (some minutes)"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$cache/bin"
    if cargo install --quiet --locked --no-default-features --root "$work" --target-dir "$work/target" \
        --version "$rublk" rublk; then
        mv "$work/bin/rublk" "$target"
    else
        echo "bench: rublk $rublk does not build here: ublk will be missing from the tables" >&2
    fi
fi
