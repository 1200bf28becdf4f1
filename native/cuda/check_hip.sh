#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the kernels of `hip` for AMD targets, and print the loads and stores of its machine code.
# The kernel is not run: this script needs hipcc, but no device.
#
#   bash native/cuda/check_hip.sh [--report FILE] [target ...]      default: gfx906 gfx908 gfx90a
#
# HIPCC, LLVM_BIN (a folder with llvm-objdump and llvm-readelf) and PYTHON name other tools.
# Exit status: 0 if all kernels are right, 1 if a kernel is wrong, 2 if a tool is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HIP_PLATFORM=amd # otherwise hipcc acts as nvcc if nvcc is installed

missing() {
    echo "$1 was not found; $2" >&2
    exit 2
}

hipcc=${HIPCC:-hipcc}
command -v "$hipcc" >/dev/null || missing "$hipcc" \
    "install it (Debian: apt-get install hipcc rocm-device-libs; else ROCm), or name it in HIPCC"

# The LLVM tools of the compiler that hipcc calls: other releases may not support its targets.
own=$("$hipcc" --version 2>/dev/null | sed -n 's/^InstalledDir: //p' | head -1 || true)
tool() {
    local place
    for place in "${LLVM_BIN:-$own}/$1" "$own/$1"-{15,16,17,18,19} "$1" "$1"-{15,16,17,18,19}; do
        if command -v "$place" >/dev/null; then
            command -v "$place"
            return
        fi
    done
    missing "$1" \
        "install LLVM's tools (Debian: apt-get install llvm-15), or name a folder in LLVM_BIN"
}
objdump=$(tool llvm-objdump)
readelf=$(tool llvm-readelf)

python=${PYTHON:-python3}
"$python" -c 'import portakv_conformance' 2>/dev/null || missing "a Python with portakv" \
    "install it (pip install '.[conformance]'), or name another Python in PYTHON"

exec "$python" -m portakv_conformance.vendor.hip_code \
    --hipcc "$hipcc" --llvm-objdump "$objdump" --llvm-readelf "$readelf" "$@"
