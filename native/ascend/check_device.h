// SPDX-License-Identifier: Apache-2.0
// The device interface of check.cpp, for the emulation, for CANN's CPU twin and for an NPU.
// `Device` allocates, copies to and from the device, and launches. `cores` and `ub_bytes` are the
// device's sizes; `most_ub` is the largest buffer that a test can use.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(PORTAKV_EMULATION)
#include "rows.h"
#include "rows_emulated.h"

class Device {
public:
    static const char* Name() { return "functionally emulated on a CPU"; }
    // The largest has more rows in a buffer than one transfer takes.
    uint32_t cores = 20, ub_bytes = 192 << 10, most_ub = 512 << 10;

    void* Allocate(size_t bytes) {
        void* memory = nullptr;  // aligned as on a device, and not a byte longer than requested
        if (posix_memalign(&memory, 512, bytes ? bytes : 1)) abort();
        memory_.push_back({reinterpret_cast<uint64_t>(memory), bytes, 1});
        return memory;
    }
    void FreeAll() {
        for (const auto& one : memory_) free(reinterpret_cast<void*>(one.first));
        memory_.clear();
    }
    void Upload(void* into, const void* from, size_t bytes) { memcpy(into, from, bytes); }
    void Download(void* into, const void* from, size_t bytes) { memcpy(into, from, bytes); }

    // Three runs of each case: copies happen immediately, as late as allowed, and at random.
    static int Turns() { return 3; }
    const char* Launch(const portakv::Copy& copy, uint32_t blocks, uint32_t ub, int turn) {
        try {
            portakv_emulation::Machine on(
                memory_, ub, static_cast<portakv_emulation::When>(turn), 1u + turn);
            portakv_emulation::run_rows(on, copy, blocks, ub);
            return nullptr;
        } catch (const portakv_emulation::Fault& found) {
            snprintf(why_, sizeof why_, "%s", found.what());
            return why_;
        }
    }

private:
    std::vector<portakv_emulation::Memory> memory_;
    char why_[512];
};

#elif defined(ASCENDC_CPU_DEBUG)
#include "copy.h"
#include "tikicpulib.h"

extern "C" __global__ __aicore__ void portakv_rows(
    GM_ADDR, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, GM_ADDR, uint32_t);

class Device {
public:
    static const char* Name() { return "CANN's CPU twin"; }
    uint32_t cores = 8, ub_bytes = 184 << 10, most_ub = ub_bytes;

    void* Allocate(size_t bytes) {
        memory_.push_back(AscendC::GmAlloc(bytes ? bytes : 1));
        return memory_.back();
    }
    void FreeAll() {
        for (void* one : memory_) AscendC::GmFree(one);
        memory_.clear();
    }
    void Upload(void* into, const void* from, size_t bytes) { memcpy(into, from, bytes); }
    void Download(void* into, const void* from, size_t bytes) { memcpy(into, from, bytes); }

    static int Turns() { return 1; }
    const char* Launch(const portakv::Copy& copy, uint32_t blocks, uint32_t ub, int) {
        AscendC::SetKernelMode(KernelMode::AIV_MODE);
        ICPU_RUN_KF(
            portakv_rows, blocks, (uint8_t*)copy.nest, copy.src.table, copy.src.base, copy.src.ids,
            copy.src.wide, copy.src.first, copy.src.limit, copy.dst.table, copy.dst.base,
            copy.dst.ids, copy.dst.wide, copy.dst.first, copy.dst.limit, copy.units,
            (uint8_t*)copy.status, ub);
        return nullptr;
    }

private:
    std::vector<void*> memory_;
};

#else
#include "acl/acl.h"
#include "copy.h"

class Device {
public:
    static const char* Name() { return "an NPU"; }
    uint32_t cores = 0, ub_bytes = 0, most_ub = 0;

    Device() {
        Must(aclInit(nullptr), "aclInit");
        Must(aclrtSetDevice(0), "aclrtSetDevice");
        Must(aclrtCreateStream(&stream_), "aclrtCreateStream");
        Must(portakv_ascend_platform(&cores, &ub_bytes), "portakv_ascend_platform");
        most_ub = ub_bytes;
    }

    void* Allocate(size_t bytes) {
        void* memory = nullptr;
        Must(aclrtMalloc(&memory, bytes ? bytes : 1, ACL_MEM_MALLOC_HUGE_FIRST), "aclrtMalloc");
        memory_.push_back(memory);
        return memory;
    }
    void FreeAll() {
        for (void* one : memory_) aclrtFree(one);
        memory_.clear();
    }
    void Upload(void* into, const void* from, size_t bytes) {
        if (bytes) Must(aclrtMemcpy(into, bytes, from, bytes, ACL_MEMCPY_HOST_TO_DEVICE), "upload");
    }
    void Download(void* into, const void* from, size_t bytes) {
        if (bytes)
            Must(aclrtMemcpy(into, bytes, from, bytes, ACL_MEMCPY_DEVICE_TO_HOST), "download");
    }

    static int Turns() { return 1; }
    const char* Launch(const portakv::Copy& copy, uint32_t blocks, uint32_t ub, int) {
        if (portakv_ascend_rows(&copy, blocks, ub, stream_)) return "The launch was refused.";
        Must(aclrtSynchronizeStream(stream_), "aclrtSynchronizeStream");
        return nullptr;
    }

private:
    static void Must(int error, const char* what) {
        if (error == 0) return;
        fprintf(stderr, "%s failed with error %d.\n", what, error);
        exit(1);
    }
    aclrtStream stream_ = nullptr;
    std::vector<void*> memory_;
};
#endif
