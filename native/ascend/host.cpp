// SPDX-License-Identifier: Apache-2.0
// The library's C interface (copy.h) on a machine with CANN: the host's compiler builds it.
#include "copy.h"
#include "tiling/platform/platform_ascendc.h"

extern "C" void portakv_ascend_launch(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream);

extern "C" uint32_t portakv_ascend_abi() { return portakv::kAbi; }

extern "C" uint32_t portakv_ascend_emulated() { return 0; }

extern "C" int portakv_ascend_platform(uint32_t* blocks, uint32_t* ub_bytes) {
    auto* platform = platform_ascendc::PlatformAscendCManager::GetInstance();
    if (platform == nullptr) return 1;
    uint64_t bytes = 0;
    platform->GetCoreMemSize(platform_ascendc::CoreMemType::UB, bytes);
    *blocks = platform->GetCoreNumAiv();
    *ub_bytes = static_cast<uint32_t>(bytes);
    return *blocks == 0 || bytes < portakv::kLeastUb || bytes > UINT32_MAX;
}

extern "C" int portakv_ascend_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    if (copy == nullptr || portakv::why_not(*copy, blocks, ub_bytes) != nullptr) return 1;
    if (copy->units != 0) portakv_ascend_launch(copy, blocks, ub_bytes, stream);
    return 0;
}
