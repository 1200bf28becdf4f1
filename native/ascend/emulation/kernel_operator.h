// SPDX-License-Identifier: Apache-2.0
// The part of the AscendC API that the kernel uses, functionally emulated on a CPU.
//
// Names, argument types and ranges are those of CANN's basic API (reference "Ascend C operator
// development interface", 8.0 - 8.5; blockCount has 12 bits, a padded blockLen 21). Nothing else is
// here, so that a kernel which compiles against this header uses nothing else. g++ ignores what only
// bisheng reads (__aicore__, __gm__), and so do we.
#pragma once
#include "machine.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*

enum event_t { EVENT_ID0 = 0 };

namespace AscendC {

namespace emulation = portakv_emulation;
using emulation::fault;
using emulation::machine;

enum class TPosition { GM, VECIN, VECOUT, VECCALC };
enum class HardEvent { S_MTE3 };
typedef int8_t TEventID;

inline int64_t GetBlockIdx() { return machine().block_index; }
inline int64_t GetBlockNum() { return machine().block_count; }

template <HardEvent event> void SetFlag(int32_t id) { machine().SetFlag(id); }
template <HardEvent event> void WaitFlag(int32_t id) { machine().WaitFlag(id); }

template <typename T> class GlobalTensor {
public:
    void SetGlobalBuffer(T* address, uint64_t elements) {
        if (reinterpret_cast<uint64_t>(address) % sizeof(T))
            fault("A global tensor begins at an address that its elements do not allow");
        address_ = reinterpret_cast<uint64_t>(address);
        bytes_ = elements * sizeof(T);
    }
    void SetGlobalBuffer(T* address) { SetGlobalBuffer(address, UINT64_MAX / sizeof(T)); }

    T GetValue(uint64_t at) const {
        T value;
        memcpy(&value, reinterpret_cast<const void*>(Bytes(at * sizeof(T), sizeof(T), false)),
               sizeof(T));
        return value;
    }

    GlobalTensor operator[](uint64_t elements) const {
        GlobalTensor rest;
        rest.address_ = address_ + elements * sizeof(T);
        if (elements * sizeof(T) > bytes_) fault("A global tensor begins after its buffer's end");
        rest.bytes_ = bytes_ - elements * sizeof(T);
        return rest;
    }

    // Where the bytes are that an operation touches.
    uint64_t Bytes(uint64_t offset, uint64_t bytes, bool writes) const {
        if (offset > bytes_ || bytes > bytes_ - offset)
            fault("%llu bytes at offset %llu run past the end of a global tensor of %llu bytes",
                  (unsigned long long)bytes, (unsigned long long)offset,
                  (unsigned long long)bytes_);
        return machine().Global(address_ + offset, bytes, writes);
    }

private:
    uint64_t address_ = 0, bytes_ = 0;
};

template <typename T> class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(uint32_t buffer, uint64_t offset) : buffer(buffer), offset(offset) {}

    LocalTensor operator[](uint32_t elements) const {
        machine().Local(buffer, offset + elements * sizeof(T), 0);
        return LocalTensor(buffer, offset + elements * sizeof(T));
    }

    T GetValue(uint32_t at) const {
        const uint64_t place = offset + at * sizeof(T);
        T value;
        memcpy(&value, machine().Local(buffer, place, sizeof(T)), sizeof(T));
        return value;
    }

    void SetValue(uint32_t at, T value) const {
        const uint64_t place = offset + at * sizeof(T);
        memcpy(machine().Local(buffer, place, sizeof(T)), &value, sizeof(T));
        machine().WrittenByScalar(buffer, place, sizeof(T));
    }

    uint32_t buffer = UINT32_MAX;
    uint64_t offset = 0;  // bytes in the buffer
};

// A queue whose buffers serve as input and as output: what is loaded may be stored after DeQue.
template <TPosition src, TPosition dst, int32_t depth> class TQueBind {
public:
    template <typename T> LocalTensor<T> AllocTensor() {
        for (uint32_t buffer : buffers_) {
            emulation::Buffer& one = machine().At(buffer);
            if (one.state != emulation::Buffer::kFree) continue;
            one.state = emulation::Buffer::kAllocated;
            machine().Complete(one.stores, false);  // the event that the allocation waits for
            machine().Poison(buffer);
            return LocalTensor<T>(buffer, 0);
        }
        fault("AllocTensor found no free buffer among %zu: the core would hang", buffers_.size());
    }

    template <typename T> bool EnQue(const LocalTensor<T>& tensor) {
        Turn(tensor, "EnQue", emulation::Buffer::kAllocated, emulation::Buffer::kEnqueued);
        if (waiting_.size() == static_cast<size_t>(depth))
            fault("EnQue of more than %d tensors without DeQue, the depth of the queue", depth);
        waiting_.push_back(tensor.buffer);
        return true;
    }

    template <typename T> LocalTensor<T> DeQue() {
        if (waiting_.empty()) fault("DeQue of an empty queue: the core would hang");
        const uint32_t buffer = waiting_.front();
        waiting_.pop_front();
        emulation::Buffer& one = machine().At(buffer);
        one.state = emulation::Buffer::kDequeued;
        machine().Complete(one.loads, true);
        return LocalTensor<T>(buffer, 0);
    }

    template <typename T> void FreeTensor(LocalTensor<T>& tensor) {
        Turn(tensor, "FreeTensor", emulation::Buffer::kDequeued, emulation::Buffer::kFree);
    }

private:
    friend class TPipe;

    template <typename T>
    void Turn(const LocalTensor<T>& tensor, const char* what, emulation::Buffer::State from,
              emulation::Buffer::State to) {
        static const char* const kNames[] = {"free", "allocated", "enqueued", "dequeued", "scratch"};
        emulation::Buffer& one = machine().At(tensor.buffer);
        if (one.owner != this) fault("%s of a tensor of another queue", what);
        if (one.state != from)
            fault("%s of a tensor that is %s and not %s", what, kNames[one.state], kNames[from]);
        one.state = to;
    }

    std::vector<uint32_t> buffers_;
    std::deque<uint32_t> waiting_;
};

template <TPosition position, int32_t depth> class TQue : public TQueBind<position, position, depth> {};

// Scratch memory without a queue.
template <TPosition position> class TBuf {
public:
    template <typename T> LocalTensor<T> Get() const { return LocalTensor<T>(buffer_, 0); }

private:
    friend class TPipe;
    uint32_t buffer_ = UINT32_MAX;
};

class TPipe {
public:
    template <TPosition src, TPosition dst, int32_t depth>
    bool InitBuffer(TQueBind<src, dst, depth>& queue, uint8_t count, uint32_t bytes) {
        if (count == 0 || !queue.buffers_.empty())
            fault("InitBuffer of a queue with %d buffers, or for the second time", count);
        for (uint8_t at = 0; at < count; ++at)
            queue.buffers_.push_back(machine().AddBuffer(&queue, bytes, emulation::Buffer::kFree));
        return true;
    }

    template <TPosition position> bool InitBuffer(TBuf<position>& buf, uint32_t bytes) {
        buf.buffer_ = machine().AddBuffer(&buf, bytes, emulation::Buffer::kScratch);
        return true;
    }

    TEventID FetchEventID(HardEvent) { return 0; }
};

struct DataCopyParams {
    DataCopyParams() = default;
    DataCopyParams(uint16_t count, uint16_t length, uint16_t src, uint16_t dst)
        : blockCount(count), blockLen(length), srcStride(src), dstStride(dst) {}
    uint16_t blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;  // blocks of 32 bytes
};

struct DataCopyExtParams {
    DataCopyExtParams() = default;
    DataCopyExtParams(uint16_t count, uint32_t length, uint32_t src, uint32_t dst, uint32_t)
        : blockCount(count), blockLen(length), srcStride(src), dstStride(dst) {}
    uint16_t blockCount = 1;
    uint32_t blockLen = 0;                  // bytes
    uint32_t srcStride = 0, dstStride = 0;  // gaps: bytes in global memory, blocks of 32 in UB
};

template <typename T> struct DataCopyPadExtParams {
    DataCopyPadExtParams() = default;
    DataCopyPadExtParams(bool pads, uint8_t left, uint8_t right, T value)
        : isPad(pads), leftPadding(left), rightPadding(right), paddingValue(value) {}
    bool isPad = false;
    uint8_t leftPadding = 0, rightPadding = 0;
    T paddingValue = 0;
};

}  // namespace AscendC

#include "copies.h"
