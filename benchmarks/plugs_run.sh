#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measure the integrations on a machine with a GPU, with the engines that are installed there. The clone
# must be installed (pip install --no-deps -e .), because engines find integrations by entry points:
# bash benchmarks/plugs_run.sh FOLDER. FOLDER gets the output of doctor, a log of each engine's tests,
# of which none takes more than 100 s, and the result (<device>-plugs.json) with its plots and tables,
# after 60 to 100 s an engine. LMCACHE_SOURCES and VLLM_SOURCES name unpacked source archives, and
# SGLANG_SOURCES a checkout, whose own tests run against the integrations. ENGINES are the parts to measure;
# SKIP_TESTS=1 leaves PortaKV's tests out. DEVICE=cpu PRESET=tiny tries the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(realpath "$1")
read -ra engines <<<"${ENGINES:-sglang vllm lmcache}"
device=${DEVICE:-cuda}

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
# The packages under the names that the installed packages have, and the stand-ins for engines' tests.
export PYTHONPATH=$PWD/src:$PWD:$PWD/tests/integrations${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=200 LMCACHE_TRACK_USAGE=false
unset PORTAKV_BACKEND LMCACHE_DEVICE_BACKEND PORTAKV_SGLANG

status=0
timeout 60 python3 -m portakv doctor >"$out/doctor.txt" || status=1

# tests NAME FOLDER ARGUMENTS...: run them in a separate process, because an engine changes torch for
# the whole process. Status 5 means that none of the tests is for a GPU.
tests() {
    local log=$out/pytest-$1.log from=$2 code=0
    shift 2
    (cd "$from" && timeout --signal=INT --kill-after=10 100 python3 -m pytest -q -p no:cacheprovider \
        -o addopts=--import-mode=importlib "$@") >"$log" 2>&1 || code=$?
    ((code == 0 || code == 5)) || status=1
    echo "$log: $(tail -n 1 "$log" | cut -c 1-160)"
}

if [[ -z ${SKIP_TESTS:-} ]]; then
    for each in kvcacheio sglang lmcache_ops lmcache vllm transformers; do
        tests "$each" . -m gpu "tests/integrations/test_$each.py"
    done
fi
if [[ -n ${LMCACHE_SOURCES:-} ]]; then
    LMCACHE_DEVICE_BACKEND=portakv-cuda tests lmcache-own "$LMCACHE_SOURCES" --noconftest -p lmcache_cuda_ops \
        tests/v1/test_{{,mp_}mem_kernels,gpu_connector}.py tests/v1/gpu_connector/test_blocks_first_kernel_roundtrip.py \
        tests/v1/multiprocess/test_{blocked_scale_format,direct_copy_{planner,transfer}_gpu}.py \
        -k "not rejects_hnd_layout and not eligibility_table"
fi
if [[ -n ${SGLANG_SOURCES:-} ]]; then
    tests sglang-own "$SGLANG_SOURCES" --noconftest -p sglang_own_tests sgl-kernel/tests/test_kvcacheio.py
fi
if [[ -n ${VLLM_SOURCES:-} ]]; then
    tests vllm-own "$VLLM_SOURCES" --noconftest -p vllm_own_tests -k "test_transfer or load_waits" \
        tests/v1/kv_offload/cpu/test_gpu_worker.py
fi

declare -A seconds=([sglang]=60 [vllm]=75 [lmcache]=100)
for each in "${engines[@]}"; do
    timeout --signal=INT --kill-after=10 120 python3 -m portakv_benchmarks.cli --plugs --device "$device" \
        --preset "${PRESET:-full}" --only "$each" --seconds "${seconds[$each]}" --out "$parts/$each" \
        >"$out/bench-$each.log" 2>&1 || status=1
done
python3 -m portakv_benchmarks.host.merge "$parts"/*/*.json --out "$out" >"$out/plugs.log" 2>&1 || status=1
tail -n 60 "$out/plugs.log"
exit "$status"
