#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the kernels of `hip` for Hygon's newer DCUs, which only Hygon's DTK supports, and test the
# backend if there is a card.
#
#   bash native/cuda/check_dtk.sh [target ...]      default: gfx928 gfx936
#
# PortaKV has not run this script: no DTK and no DCU were available. The targets are those of public
# build files (gfx906 Z100, gfx926, gfx928 K500SM_AI, gfx936 BW1000, gfx938). DTKROOT names another
# folder than /opt/dtk, OUT one for results (default: out/ of this repository). Send its output
# and that folder, as docs/hardware.md describes.
set -eo pipefail # not -u: the DTK's env.sh reads names that may not be set
cd "$(dirname "$0")/../.."

dtk=${DTKROOT:-/opt/dtk}
if ! [ -x "$dtk/bin/hipcc" ]; then
    echo "$dtk/bin/hipcc was not found; install Hygon's DTK, or name its folder in DTKROOT." >&2
    echo "PortaKV has not run this script: please send its output." >&2
    exit 2
fi
[ ! -f "$dtk/env.sh" ] || . "$dtk/env.sh"
python=${PYTHON:-python3}
targets=("$@")
[ $# -gt 0 ] || targets=(gfx928 gfx936)

out=${OUT:-out}
mkdir -p "$out"
# The DTK's own LLVM, because no other LLVM supports these targets.
bin=$(dirname "$(find -L "$dtk" -name llvm-objdump -print -quit)")
built=0
HIPCC="$dtk/bin/hipcc" LLVM_BIN="$bin" PYTHON="$python" \
    bash native/cuda/check_hip.sh --dtk --report "$out/hip-dtk.json" "${targets[@]}" || built=$?

card='import sys, torch; sys.exit(not (torch.version.hip and torch.cuda.is_available()))'
if "$python" -c "$card"; then
    "$python" -m portakv conform hip --profile full --report "$out"
else
    echo "torch finds no DCU here, or is not built for ROCm: nothing was run, only built."
fi
exit "$built"
