#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build and run the same kernel, unchanged, with CANN's own toolchain: in its CPU twin (no device
# needed) and, with an NPU, on the device. For people who have CANN, for instance in its container.
#
# THIS PROJECT HAS NOT RUN THIS SCRIPT. It was written from CANN's documentation and public projects.
# If it does not work for you, please send the log: the project has no such evidence.
#
#   run_in_cann.sh cpu [SOC_VERSION]        CPU twin: any machine with CANN
#   run_in_cann.sh sim [SOC_VERSION]        CANN's simulator
#   run_in_cann.sh npu [SOC_VERSION]        the device; SOC_VERSION as `npu-smi info` names the chip.
#                                           Leaves the library in lib/ next to this file, where
#                                           portakv finds it and PORTAKV_ASCENDC can name it.
#   OUT=folder run_in_cann.sh ...           where the log goes (default: the current folder)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mode=${1:-} soc=${2:-Ascend910B1} out=${OUT:-$PWD}

if [[ ! $mode =~ ^(cpu|sim|npu)$ ]]; then
    echo "Expected the mode cpu, sim or npu, got '$mode'."
    exit 2
fi
if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    for place in /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/cann "$HOME/Ascend/ascend-toolkit"; do
        [[ ! -f $place/set_env.sh ]] || {
            set +u
            # shellcheck disable=SC1091
            source "$place/set_env.sh"
            set -u
            break
        }
    done
fi
if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
    echo "CANN was not found: ASCEND_HOME_PATH is not set. Source CANN's set_env.sh, or start its container."
    exit 3
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/portakv-ascendc-$mode.log

run() {
    echo "PortaKV's AscendC kernel, RUN_MODE=$mode, SOC_VERSION=$soc"
    date -u +%Y-%m-%dT%H:%M:%SZ
    uname -srm
    cat "$ASCEND_HOME_PATH"/{version.cfg,version.info,*/ascend_toolkit_install.info} 2>/dev/null || true
    (cd "$here" && sha256sum copy.h rows.h launch.cpp host.cpp check.cpp check_device.h CMakeLists.txt)
    if [[ $mode == npu ]]; then npu-smi info; fi
    cmake -S "$here" -B "$work" -DRUN_MODE="$mode" -DSOC_VERSION="$soc" \
        -DASCEND_CANN_PACKAGE_PATH="$ASCEND_HOME_PATH" || return
    cmake --build "$work" --parallel "$(nproc)" || return
    export LD_LIBRARY_PATH=$work:$work/lib:${LD_LIBRARY_PATH:-}
    if [[ $mode == sim ]]; then
        LD_LIBRARY_PATH=$ASCEND_HOME_PATH/tools/simulator/$soc/lib:$LD_LIBRARY_PATH "$work/check" || return
    else
        "$work/check" || return
    fi
    if [[ $mode == npu ]]; then
        cmake --install "$work" --prefix "$here/lib" || return
        echo "PORTAKV_ASCENDC=$here/lib/libportakv_ascend.so portakv conform ascend --report out/"
    fi
}

status=0
run 2>&1 | tee "$log" || status=$?
echo "The log is $log. Status $status."
exit "$status"
