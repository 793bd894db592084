#!/usr/bin/env bash
# Build Helm, which renders, checks and installs the chart, into the cache (CSI_VDUSE_CACHE, or .cache) below bin/.
#
#   tools/build_helm.sh        print the path of the program; build it only if it is not there
#
# Keeps true: the program is whole and of the pinned version, or absent. The version and the checksum of the
# module are compiled into the program by Go; both are compared, also for one that is there already.
set -euo pipefail

module=helm.sh/helm/v3
version=v3.22.0
sum=h1:n1if5iQgHYsujPAcO5oonH/KiSNUmqmUF0iGVjSF3AU=

bin="${CSI_VDUSE_CACHE:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache}/bin"
program="$bin/helm"

is_pinned() {
    go version -m "$1" 2>/dev/null | awk -v m="$module" -v v="$version" -v s="$sum" '
        $1 == "mod" && $2 == m && $3 == v && $4 == s { found = 1 } END { exit !found }'
}

if ! command -v go >/dev/null; then
    echo "build_helm: Go is not installed; Helm $version is built from its module with it" >&2
    exit 1
fi
if ! is_pinned "$program"; then
    mkdir -p "$bin"
    # Beside the target, so that the move below is atomic.
    fresh="$(mktemp -d "$bin/.helm.XXXXXX")"
    trap 'rm -rf "$fresh"' EXIT
    # Go waits for a server that says nothing as long as it takes, and goes on where it was.
    for _ in 1 2 3; do
        CGO_ENABLED=0 GOBIN="$fresh" timeout 600 \
            go install -trimpath -ldflags='-s -w' "$module/cmd/helm@$version" >&2 && break
    done
    if ! is_pinned "$fresh/helm"; then
        echo "build_helm: $module@$version does not have the checksum $sum; nothing was installed" >&2
        exit 1
    fi
    mv "$fresh/helm" "$program"
fi
echo "$program"
