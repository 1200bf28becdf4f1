#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Test and measure what crosses between two GPUs of one machine, from a clone that is not installed:
# bash benchmarks/pair_run.sh FOLDER [PART...]. Parts, with their longest time in seconds: tests 180,
# soak 600 (pulls with kills), wall 130 (pulls and weights by the wall clock), staged 110 (by NCCL, NIXL and
# Mooncake), transports 70 (packed rows), handover 240 and ranks 200 (two engines; vLLM), first 300 (first
# hand-overs and loads of engines, next to later ones). All take half an hour. FOLDER gets PART.json, PART.log
# and the verdicts in PART.check. PRESET=tiny DEVICE=cpu tries the script itself, without tests and soak.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(realpath "$1")
shift
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=200
unset PORTAKV_BACKEND
read -ra preset <<<"${PRESET:+--preset $PRESET}"
status=0

# tests PART SECONDS ARGUMENTS...: -v, so that the name of a test that fails stands in a log that is cut.
tests() {
    local part=$1 seconds=$2
    shift 2
    timeout --signal=INT --kill-after=20 "$seconds" python3 -m pytest -o addopts=--import-mode=importlib -v --tb=short \
        -p no:cacheprovider -p portakv_conformance.run.options "$@" >"$out/$part.log" 2>&1 || status=1
    grep "^FAILED\|^ERROR" "$out/$part.log"
    tail -n 1 "$out/$part.log"
}

# bench PART SECONDS ARGUMENTS...: begin nothing new after these seconds, and end 20 later.
bench() {
    local part=$1 seconds=$2 made
    shift 2
    made=$(mktemp -d)
    timeout --signal=INT --kill-after=10 "$((seconds + 20))" python3 -m portakv_benchmarks.cli "$@" \
        --device "${DEVICE:-cuda}" "${preset[@]}" --seconds "$seconds" --out "$made" >"$out/$part.log" 2>&1 || status=1
    if cp "$made"/*.json "$out/$part.json"; then
        python3 -m portakv_benchmarks.check "$out/$part.json" >"$out/$part.check" 2>&1 || status=1
        tail -n 1 "$out/$part.check"
    fi
    rm -rf "$made"
}

parts=("$@")
((${#parts[@]})) || parts=(tests soak wall staged transports handover ranks first)
for part in "${parts[@]}"; do
    echo "$(date +%T) $part"
    case $part in
    tests) tests tests 180 -m gpu -n 14 tests/copy tests/runtime tests/migrate ;;
    soak) SOAK_RESULTS=$out/soak.json tests soak 600 -m "gpu and full" -n 4 tests/migrate/test_pull_soak.py ;;
    wall) bench wall 110 --migration --wall ;;
    staged) bench staged 90 --migration --only staged,scattered ;;
    transports) bench transports 50 --encodings --only transports ;;
    handover) bench handover 220 --engines --only handover --dir /tmp ;;
    ranks) bench ranks 180 --engines --only handover-ranks --dir /tmp ;;
    first)
        made=$(mktemp -d)
        timeout --kill-after=10 300 python3 -m portakv_benchmarks.engines.first "$made" ${PRESET:+--tiny} >"$out/first.log" 2>&1 || status=1
        cp "$made/first.json" "$out/"
        rm -rf "$made"
        ;;
    *)
        echo "Expected a part that is named above, got $part." >&2
        exit 2
        ;;
    esac
done
exit "$status"
