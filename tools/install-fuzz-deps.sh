#!/bin/sh
# Installs what the fuzzers need beyond the tests: clang 14 with libFuzzer, and atheris in the virtual environment.
# Idempotent. What it keeps true: what cannot be had is said here; the fuzzers that need it are then left out, and say so.
set -eu

packages="clang-14 libclang-rt-14-dev llvm-14 liburing-dev"
python=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python

installed() { dpkg-query -W -f '${db:Status-Abbrev}\n' "$1" 2>/dev/null | grep -q '^ii'; }
wanted=
for package in $packages; do installed "$package" || wanted="$wanted $package"; done
if [ -n "$wanted" ] && [ "$(id -u)" != 0 ]; then
    echo "fuzz: missing packages, install them as root: apt-get install$wanted" >&2
elif [ -n "$wanted" ]; then
    echo "fuzz: installing$wanted"
    apt-get -qq update || true
    # shellcheck disable=SC2086  # the list is words
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $wanted >/dev/null ||
        echo "fuzz: no clang 14 with libFuzzer to be had: the C engine will not be fuzzed" >&2
fi
if ! "$python" -c 'import atheris' 2>/dev/null; then
    echo "fuzz: installing atheris into the virtual environment"
    "$python" -m pip install --quiet --disable-pip-version-check atheris ||
        echo "fuzz: no atheris for this Python: the Python side will not be fuzzed" >&2
fi
