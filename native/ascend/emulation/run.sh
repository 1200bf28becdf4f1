#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the unchanged AscendC kernel on a CPU, functionally emulated. No Ascend device is involved,
# and no result here predicts the performance of a device. Needs g++; the suite also needs this package's
# Python (PYTHON, or python3 from PATH).
#
#   run.sh [matrix|misuse|mutants|suite|npu|sanitized]...  all of them if none is named
#   FULL=1 run.sh                                          the suite's full profile, not core
#   RECORD=FILE run.sh sanitized                           leaves a record for the support matrix
#   run.sh library FILE                                    builds the emulation, as PORTAKV_ASCENDC
#                                                          names it for a simulated NPU
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
native=$(dirname "$here")
python=${PYTHON:-python3}
profile=core
[[ -z ${FULL:-} ]] || profile=full
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

strict=(-std=c++17 -O1 -Wall -Wextra -Werror)
sanitizers=(-g -fsanitize=address,undefined -fno-sanitize-recover=all)
export ASAN_OPTIONS=detect_leaks=0
failed=()

command -v g++ >/dev/null || {
    echo "The emulation is compiled when it runs, but there is no g++; install it (Debian: apt install g++)."
    exit 2
}

# check NAME COMMAND...: run it, record a failure, print the seconds it took.
check() {
    local name=$1 began=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '    %d s\n' "$((SECONDS - began))"
}

# compiled FOLDER-OF-rows.h FLAGS...: the kernel matrix, from check.cpp.
compiled() {
    local folder=$1
    shift
    g++ "$@" -DPORTAKV_EMULATION -I"$folder" -I"$here" "$folder/check.cpp" -o "$folder/check"
}

matrix() {
    mkdir -p "$work/plain" && cp "$native"/*.h "$native"/check.cpp "$work/plain"
    compiled "$work/plain" "${strict[@]}" && "$work/plain/check"
}

misuse() {
    g++ "${strict[@]}" -I"$here" "$here/misuse.cpp" -o "$work/misuse" && "$work/misuse"
}

sanitized() {
    mkdir -p "$work/sanitized" && cp "$native"/*.h "$native"/check.cpp "$work/sanitized"
    compiled "$work/sanitized" "${strict[@]}" "${sanitizers[@]}" && "$work/sanitized/check" || return
    g++ "${strict[@]}" "${sanitizers[@]}" -I"$here" "$here/misuse.cpp" -o "$work/misuse-sanitized" \
        && "$work/misuse-sanitized"
}

# Each bug must be in the text, and the matrix must fail with it within a minute.
mutants() {
    local at bug edit folder survived=0
    source "$here/mutants.sh"
    for ((at = 0; at < ${#MUTANTS[@]}; at += 2)); do
        bug=${MUTANTS[at]} edit=${MUTANTS[at + 1]} folder=$work/mutant
        rm -rf "$folder" && mkdir "$folder" && cp "$native"/*.h "$native"/check.cpp "$folder"
        sed -i "$edit" "$folder/rows.h"
        if cmp -s "$native/rows.h" "$folder/rows.h"; then
            echo "  NOT SEEDED: $bug (the kernel's text has changed)"
            survived=$((survived + 1))
        elif ! compiled "$folder" -std=c++17 -O0 -w 2>"$folder/errors"; then
            echo "  NOT COMPILED: $bug"
            sed -n 1,5p "$folder/errors"
            survived=$((survived + 1))
        elif timeout 60 "$folder/check" -x >"$folder/output" 2>&1; then
            echo "  SURVIVED: $bug"
            survived=$((survived + 1))
        elif [[ -n ${VERBOSE:-} ]]; then
            echo "  caught: $bug: $(head -n 1 "$folder/output")"
        fi
    done
    echo "bugs seeded into the kernel: $((${#MUTANTS[@]} / 2)), not caught: $survived"
    ((survived == 0))
}

backend=portakv_conformance.vendor.ascendc_emulated:AscendC

# conform DEVICE BACKEND: the suite.
conform() {
    OMP_NUM_THREADS=1 "$python" -m portakv conform "$2" --device "$1" --profile "$profile"
}

has_package() {
    "$python" -c "import pytest, hypothesis, msgspec, ${backend%:*}" >/dev/null 2>&1 && return
    echo "The suite needs PortaKV with its extra 'conformance', and $python lacks one of them; run" \
        "pip install '.[conformance]' in the repository, or name another Python by PYTHON."
    return 1
}

suite() { has_package && conform cpu "$backend"; }

# Test `ascend` itself: its loader, its arguments and its launches, which a simulated device runs.
npu() {
    has_package && conform simdev:npu portakv_conformance.vendor.ascendc_npu:AscendKernel
}

suite_sanitized() {
    local runtime
    has_package || return
    runtime=$(g++ -print-file-name=libasan.so)
    [[ $runtime == /* ]] || { echo "g++ has no address sanitizer."; return 1; }
    export PORTAKV_ASCENDC_FLAGS="${sanitizers[*]}"
    LD_PRELOAD=$runtime "$python" - <<'END' || return
from pathlib import Path
from portakv_conformance.vendor.ascendc_emulated import library_file
built = Path(library_file()).read_bytes()
names = [name for name in (b"__asan_init", b"__ubsan_handle") if name in built]
print("the suite's library calls", *(name.decode() for name in names))
raise SystemExit(len(names) != 2)
END
    LD_PRELOAD=$runtime conform cpu "$backend"
}

# Run this script once more, and keep its output as a record of the support matrix.
record() {
    local file words=("$@")
    file=$(realpath "$RECORD")
    [[ -z ${FULL:-} ]] || words=(env FULL=1 "${words[@]}")
    has_package || return
    cd "$native/../.."
    env -u RECORD "$python" -m portakv_conformance.evidence.evidence --what "semantics emulated" \
        --backend "$backend" --emulated-by "${backend%:*}" \
        --device "CPU ($(uname -m | tr _ -)), emulated, under ASan and UBSan" \
        --versions "$(g++ --version | head -n 1)" --report "$file" \
        --says 'calls __asan_init __ubsan_handle[^$]*conformant, R3[^$]*\nall right\n' \
        --tells 'profile\s+\w+,\s+seed\s+\d+:\s+\d[^.]*?(?=\s+in\s+\d)' \
        -- "${words[@]}"
}

if [[ ${1:-} == library ]]; then
    [[ $# == 2 ]] || { echo "Expected run.sh library FILE, got $(($# - 1)) files."; exit 2; }
    g++ "${strict[@]}" -shared -fPIC -I"$here" "$here/library.cpp" -o "$2"
    echo "$2 emulates the AscendC kernel on a CPU; PORTAKV_ASCENDC=$2 names it for a simulated NPU."
    exit 0
fi
if [[ -n ${RECORD:-} ]]; then
    [[ $* == sanitized ]] || { echo "RECORD is for 'run.sh sanitized'."; exit 2; }
    record bash native/ascend/emulation/run.sh "$@"
    exit
fi

declare -A wanted=()
for word in "${@:-all}"; do
    [[ $word =~ ^(all|matrix|misuse|mutants|suite|npu|sanitized)$ ]] || {
        echo "Expected matrix, misuse, mutants, suite, npu, sanitized or library, got '$word'."
        exit 2
    }
    wanted[$word]=1
done
wants() { [[ -n ${wanted[all]:-} || -n ${wanted[$1]:-} ]]; }

echo "The AscendC kernel of native/ascend, functionally emulated on a CPU by $(g++ --version | head -n 1)."
if wants matrix; then check "kernel matrix" matrix; fi
if wants misuse; then check "misuse of the API" misuse; fi
if wants mutants; then check "bugs seeded into the kernel" mutants; fi
if wants sanitized; then check "kernel matrix and misuse under ASan and UBSan" sanitized; fi
if wants suite; then check "conformance suite, profile $profile" suite; fi
if wants npu; then check "ascend with the kernel on a simulated NPU, profile $profile" npu; fi
if wants sanitized; then check "conformance suite under ASan and UBSan, profile $profile" suite_sanitized; fi

echo
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
if wants sanitized && [[ -n ${wanted[all]:-} ]]; then
    echo "RECORD=ascendc-sanitized.json bash native/ascend/emulation/run.sh sanitized leaves a record."
fi
echo "The AscendC kernel was functionally emulated on a CPU; it was not run on an Ascend device."
echo "all right"
