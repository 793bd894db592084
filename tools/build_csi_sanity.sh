#!/usr/bin/env bash
# Build csi-sanity, the conformance tests of the Container Storage Interface, into .cache/bin.
#
#   tools/build_csi_sanity.sh        print the path of the program; build it only if it is not there
#
# Keeps true: .cache/bin/csi-sanity is whole and of the pinned version, or absent. The version and the checksum
# of the module are compiled into the program by Go; both are compared, also for one that is there already.
set -euo pipefail

module=github.com/kubernetes-csi/csi-test/v5
version=v5.6.0
sum=h1:fQgB/CRoqTEAtlHwfD0Y785LjQJ/OxNGUE7AHw68VLg=

bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache/bin"
program="$bin/csi-sanity"

is_pinned() {
    go version -m "$1" 2>/dev/null | awk -v m="$module" -v v="$version" -v s="$sum" '
        $1 == "mod" && $2 == m && $3 == v && $4 == s { found = 1 } END { exit !found }'
}

if ! command -v go >/dev/null; then
    echo "build_csi_sanity: Go is not installed; csi-sanity $version needs it" >&2
    exit 1
fi
if ! is_pinned "$program"; then
    mkdir -p "$bin"
    # Beside the target, so that the move below is atomic.
    fresh="$(mktemp -d "$bin/.csi-sanity.XXXXXX")"
    trap 'rm -rf "$fresh"' EXIT
    # Go waits for a server that says nothing as long as it takes, and goes on where it was.
    for _ in 1 2 3; do
        GOBIN="$fresh" timeout 600 go install "$module/cmd/csi-sanity@$version" >&2 && break
    done
    if ! is_pinned "$fresh/csi-sanity"; then
        echo "build_csi_sanity: $module@$version does not have the checksum $sum; nothing was installed" >&2
        exit 1
    fi
    mv "$fresh/csi-sanity" "$program"
fi
echo "$program"
