#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests that need a GPU, then every shape through `reference`, from a clone that is not
# installed: bash benchmarks/device_run.sh FOLDER [BACKEND...]. Under 6 minutes on one H200.
# FOLDER gets the result (<device>-<backends>.json) and both logs.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(realpath "$1")
shift
backends=("${@:-reference}")

# The packages under the names that they have once installed.
names=$(mktemp -d)
trap 'rm -rf "$names"' EXIT
for folder in native conformance benchmarks examples; do
    ln -s "$PWD/$folder" "$names/portakv_$folder"
done
export PYTHONPATH=$names:$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=150
unset PORTAKV_BACKEND

status=0
timeout 160 python3 -m pytest -m gpu -q -p no:cacheprovider 2>&1 | tee "$out/pytest-gpu.log" ||
    status=1
# Interrupted, it writes what it has measured so far.
timeout --signal=INT --kill-after=20 190 python3 -m portakv_benchmarks.cli --device cuda --preset full \
    "${backends[@]/#/--backend=}" --out "$out" 2>&1 | tee "$out/bench.log" || status=1
for result in "$out"/*.json; do
    python3 -m portakv_benchmarks.check "$result" || status=1
done
exit "$status"
