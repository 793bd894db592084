#!/bin/sh
# Installs the Debian or Ubuntu packages that the laboratory and the VM suite need, and says which.
# Idempotent, and quick when everything is there. Needs root only if something is missing.
# What it keeps true: it touches nothing but packages; kernels and virtiofsd go to the cache (python -m lab prepare).
set -eu

packages="qemu-system-x86 qemu-utils openssh-client openssh-server bubblewrap udev iproute2 kmod busybox-static file procps \
    util-linux e2fsprogs xfsprogs btrfs-progs fio nbdkit nbd-server openssl debian-archive-keyring ca-certificates \
    flex bison bc libelf-dev xz-utils"    # these build a kernel
installed() { dpkg-query -W -f '${db:Status-Abbrev}\n' "$1" 2>/dev/null | grep -q '^ii'; }
missing() { for package in "$@"; do installed "$package" || printf '%s ' "$package"; done; }
if ! command -v dpkg-query >/dev/null; then
    echo "lab: this is not a Debian-like system; install by hand what matches: $packages, and virtiofsd" >&2
    exit 1
fi

# shellcheck disable=SC2086  # the list is words
wanted=$(missing $packages)
if [ -z "$wanted" ]; then
    echo "lab: all packages are installed"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "lab: missing packages, install them as root: apt-get install $wanted" >&2
    exit 1
fi
echo "lab: installing $wanted"
apt-get -q update
# No service is started by it: containers and test machines have no init system, and nobody asked for an SSH server.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $wanted
