#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measure the host side on a machine with a GPU, from a clone that is not installed:
# bash benchmarks/host_run.sh FOLDER. On one H200 the measurements take up to 9 minutes, the tests one.
# FOLDER gets the result (<device>-host.json), its two plots, its tables (host.log), and the logs of
# the tests, of calibration and of the benchmark. Each part has a time limit and a separate process,
# and the result is written again after each part: earlier measurements stay. PEERS names peers to
# measure as well, such as "lmcache"; they come last. SKIP_TESTS=1 leaves the tests out; TESTS are the
# folders or files to run (default: those of the host side).
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(realpath "$1")
read -ra peers <<<"${PEERS:-}"
tests=(${TESTS:-tests/host tests/interconnect tests/copy})

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
# The packages under the names that the installed packages have.
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=200
unset PORTAKV_BACKEND

status=0
if [[ -z ${SKIP_TESTS:-} ]]; then
    timeout --signal=INT --kill-after=10 70 python3 -m pytest -o addopts=--import-mode=importlib -m gpu -q -p no:cacheprovider \
        -p portakv_conformance.run.options "${tests[@]}" >"$out/pytest-host.log" 2>&1 || status=1
    tail -n 15 "$out/pytest-host.log"
fi

timeout --signal=INT --kill-after=5 25 python3 -m portakv calibrate >"$out/calibrate.log" 2>&1 || status=1
tail -n 3 "$out/calibrate.log"

# measure SECONDS PARTS [OPTIONS]: start no new part after these seconds. 15 seconds later the
# benchmark is interrupted, and writes the results so far.
measure() {
    local seconds=$1 what=$2
    shift 2
    timeout --signal=INT --kill-after=10 "$((seconds + 15))" python3 -m portakv_benchmarks.cli --host \
        --device cuda --only "$what" --seconds "$seconds" "$@" \
        --out "$parts/${what%%,*}" >>"$out/bench.log" 2>&1 || status=1
    merge || true
}

merge() {
    local results=("$parts"/*/*.json)
    [[ -f ${results[0]} ]] || return 1
    python3 -m portakv_benchmarks.host.merge "${results[@]}" --out "$out" >"$out/host.log" 2>&1
}

: >"$out/bench.log"
measure 140 grid
measure 95 direct,duplex,calls,small,waiting
measure 190 interference
measure 60 short
measure 70 pageable,pinning
if ((${#peers[@]})); then measure 60 peers "${peers[@]/#/--peer=}"; fi
merge || status=1
if [[ -f $out/host.log ]]; then tail -n 60 "$out/host.log"; else tail -n 20 "$out/bench.log"; fi
exit "$status"
