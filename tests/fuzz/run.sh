#!/bin/sh
# Runs the fuzzers, two at a time, each for so many seconds: tests/fuzz/run.sh SECONDS [FUZZER...]
# Inputs that the committed corpus lacks go to the cache; findings too, and end the run with 1.
set -eu

seconds=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${CSI_VDUSE_CACHE:-$root/.cache}/fuzz
mkdir -p "$cache/findings"

if [ $# = 0 ]; then
    if command -v clang-14 >/dev/null; then set -- split packed log threads nbd; fi
    if "$root/.venv/bin/python" -c 'import atheris' 2>/dev/null; then set -- "$@" session decode; fi
fi
[ $# != 0 ] || { echo "fuzz: neither clang-14 nor atheris is here: nothing was fuzzed" >&2; exit 1; }
case " $* " in *" split "* | *" packed "* | *" log "* | *" threads "* | *" nbd "*)
    make -s -j2 -C "$here" BUILD="$cache" ;;
esac

fuzz() {
    corpus=$here/corpus/$1
    # A fuzzer of the same name keeps what it learned; threads plays the log's inputs.
    [ "$1" != threads ] || corpus=$here/corpus/log
    case $1 in
    session | decode) set -- "$1" "$root/.venv/bin/python" "$here/fuzz_$1.py" ;;
    *) set -- "$1" "$cache/$1" ;;
    esac
    name=$1
    shift
    mkdir -p "$cache/new-$name"
    if PYTHONPATH=$root nice -n 15 "$@" -max_total_time="$seconds" -max_len=600 -timeout=25 -rss_limit_mb=1500 \
        -print_final_stats=1 -artifact_prefix="$cache/findings/$name-" "$cache/new-$name" "$corpus" \
        >"$cache/$name.txt" 2>&1; then
        echo "fuzz: $name: $(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) second.*/\1 inputs in \2 s/p' "$cache/$name.txt")"
    else
        tail -n 40 "$cache/$name.txt"
        echo "fuzz: $name FOUND SOMETHING: the input is in $cache/findings"
        return 1
    fi
}

status=0
while [ $# != 0 ]; do
    fuzz "$1" &
    first=$!
    shift
    if [ $# != 0 ]; then
        fuzz "$1" || status=1
        shift
    fi
    wait $first || status=1
done
exit $status
