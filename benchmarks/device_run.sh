#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the tests that need a GPU, then the full preset, from a clone that is not installed:
# bash benchmarks/device_run.sh FOLDER [BACKEND...]. Under 6 minutes on one H200. FOLDER gets the
# result (<device>.json, with backends by name <device>-<backends>.json), its plots and both logs.
# PEERS names peers to measure as well, such as "lmcache"; SKIP_TESTS=1 leaves the tests out.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(realpath "$1")
shift
backends=("$@")
read -ra peers <<<"${PEERS:-}"

# The packages under the names that the installed packages have.
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=200
unset PORTAKV_BACKEND

# An installation has bytecode, which the start of a process counts on.
python3 -m compileall -q portakv

status=0
if [[ -z ${SKIP_TESTS:-} ]]; then
    timeout 160 python3 -m pytest -o addopts=--import-mode=importlib -m gpu -q -p no:cacheprovider -p portakv_conformance.run.options 2>&1 |
        tee "$out/pytest-gpu.log" || status=1
fi
# After --seconds it starts no new part. When interrupted, it writes the results so far.
timeout --signal=INT --kill-after=20 220 python3 -m portakv_benchmarks.cli --device cuda \
    --preset full --seconds 190 "${backends[@]/#/--backend=}" "${peers[@]/#/--peer=}" \
    --out "$out" 2>&1 | tee "$out/bench.log" || status=1
for result in "$out"/*.json; do
    python3 -m portakv_benchmarks.check "$result" || status=1
done
exit "$status"
