#!/bin/sh
# Installs the Debian or Ubuntu packages that building, testing and using csi-vduse need, and says which.
# Idempotent, and quick when everything is there. What only the laboratory needs is in lab/install-deps.sh.
set -eu

packages="python3-venv python3-dev gcc g++ libc6-dev make liburing-dev libssl-dev libseccomp2 linux-libc-dev e2fsprogs xfsprogs btrfs-progs util-linux kmod \
    qemu-utils qemu-system-common openssl strace"
missing=
for package in $packages; do
    dpkg-query -W -f '${db:Status-Abbrev}\n' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "install-deps: missing packages, install them as root: apt-get install$missing" >&2
    exit 1
fi
echo "install-deps: installing$missing"
apt-get -qq update
# shellcheck disable=SC2086  # the list is words
DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >/dev/null
