#!/bin/sh
# Installs the Debian packages that the cluster lab needs besides those of the laboratory, and those that are named as
# arguments, and says which.
# Idempotent, and quick when everything is there. No service is started by it. Go is not among them: see docs/cluster-lab.md.
set -eu

packages="containerd runc containernetworking-plugins buildah debootstrap busybox-static iproute2 git $*"
missing=
for package in $packages; do
    dpkg-query -W -f '${db:Status-Abbrev}\n' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "lab: missing packages, install them as root: apt-get install$missing" >&2
    exit 1
fi
echo "lab: installing$missing"
apt-get -q update
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
# shellcheck disable=SC2086  # the list is words
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing
