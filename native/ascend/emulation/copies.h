// SPDX-License-Identifier: Apache-2.0
// Copies between global memory and UB: what they check, and what they move. Part of
// kernel_operator.h.
#pragma once

namespace portakv_emulation {

// Rows of one copy, all in bytes; distances run from the start of a row to the start of the next.
struct Rows {
    uint64_t count, bytes, global_step, local_step;
};

template <typename T> struct Place {
    const AscendC::GlobalTensor<T>& global;
    const AscendC::LocalTensor<T>& local;
};

inline void check_counts(uint64_t count, uint64_t length, uint64_t most) {
    if (count < 1 || count > 4095)
        fault("Expected a copy of 1 to 4095 blocks, got %llu", (unsigned long long)count);
    if (length < 1 || length > most)
        fault("Expected a copy of blocks of length 1 to %llu, got length %llu",
              (unsigned long long)most, (unsigned long long)length);
}

template <typename T> void move(const Place<T>& place, const Rows& rows, bool load) {
    Machine& on = machine();
    const uint32_t buffer = place.local.buffer;
    const Buffer::State state = on.At(buffer).state;
    // UB begins at a multiple of 32, so the buffer's own offset decides.
    if ((on.At(buffer).first + place.local.offset) % kBlock)
        fault("A copy at UB offset %llu, no multiple of 32",
              (unsigned long long)(on.At(buffer).first + place.local.offset));
    if (load && state != Buffer::kAllocated)
        fault("A copy into a tensor that is not allocated from a queue: nothing would wait for it");
    if (!load && state != Buffer::kDequeued && state != Buffer::kScratch)
        fault("A copy out of a tensor that was not enqueued and dequeued: its bytes may not be there");
    for (uint64_t row = 0; row < rows.count; ++row) {
        const uint64_t offset = place.local.offset + row * rows.local_step;
        on.Local(buffer, offset, (rows.bytes + kBlock - 1) / kBlock * kBlock);
        if (!load) on.CheckSeen(buffer, offset, rows.bytes);
        const uint64_t global = place.global.Bytes(row * rows.global_step, rows.bytes, !load);
        on.Issue(buffer, {global, offset, rows.bytes}, load);
    }
}

// A copy whose lengths and gaps count blocks of 32 bytes.
template <typename T>
void move_blocks(const Place<T>& place, const AscendC::DataCopyParams& params, bool load) {
    check_counts(params.blockCount, params.blockLen, 65535);
    const uint64_t bytes = params.blockLen * kBlock;
    const uint64_t global_gap = (load ? params.srcStride : params.dstStride) * kBlock;
    const uint64_t local_gap = (load ? params.dstStride : params.srcStride) * kBlock;
    move(place, {params.blockCount, bytes, bytes + global_gap, bytes + local_gap}, load);
}

template <typename T> void move_elements(const Place<T>& place, uint32_t elements, bool load) {
    const uint64_t bytes = elements * sizeof(T);
    if (bytes == 0 || bytes % kBlock)
        fault("A copy of %llu bytes, no multiple of 32", (unsigned long long)bytes);
    move(place, {1, bytes, bytes, bytes}, load);
}

// A copy of any number of bytes; in UB each row begins at a multiple of 32.
template <typename T>
void move_padded(const Place<T>& place, const AscendC::DataCopyExtParams& params, bool load) {
    check_counts(params.blockCount, params.blockLen, 2097151);
    const uint64_t bytes = params.blockLen, padded = (bytes + kBlock - 1) / kBlock * kBlock;
    if (bytes % sizeof(T)) fault("A padded copy of %llu bytes cuts an element",
                                 (unsigned long long)bytes);
    const uint64_t global_gap = load ? params.srcStride : params.dstStride;
    const uint64_t local_gap = (load ? params.dstStride : params.srcStride) * kBlock;
    move(place, {params.blockCount, bytes, bytes + global_gap, padded + local_gap}, load);
}

}  // namespace portakv_emulation

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
    emulation::move_elements<T>({src, dst}, count, true);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
    emulation::move_elements<T>({dst, src}, count, false);
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params) {
    emulation::move_blocks<T>({src, dst}, params, true);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
    emulation::move_blocks<T>({dst, src}, params, false);
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& pad) {
    if (pad.isPad) fault("Filling by DataCopyPad is not emulated");
    emulation::move_padded<T>({src, dst}, params, true);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& params) {
    emulation::move_padded<T>({dst, src}, params, false);
}

}  // namespace AscendC
