// SPDX-License-Identifier: Apache-2.0
// The machine that kernel_operator.h uses: registered global memory, one unified buffer, and copies
// that happen when the emulation chooses. An operation that the hardware would reject, hang on or
// silently corrupt raises a `Fault` whose text is a sentence.
//
// It does not model time: no overlapping pipes, no caches, and no two cores that run at the same
// time. It shows how a kernel uses the API, and which bytes result.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace portakv_emulation {

constexpr uint64_t kBlock = 32;        // bytes of a data block in UB
constexpr uint8_t kPoison = 0xCD;      // what UB holds until something is written
constexpr uint32_t kMostBuffers = 64;  // of a pipe

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fault(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Fault(text);
}

// An allocation in global memory: the addresses that a kernel knows, and where the bytes are.
struct Memory {
    uint64_t first, bytes;
    uint64_t writable;
    uint64_t host = 0;  // 0: at `first`
};

// When a copy takes place that the kernel has issued. Hardware may do either.
enum class When { kAtOnce, kAsLateAsAllowed, kEitherWay };

struct Transfer {
    uint64_t global;
    uint64_t local;  // offset in UB
    uint64_t bytes;
};

// A buffer in UB: of a queue, or scratch.
struct Buffer {
    enum State { kFree, kAllocated, kEnqueued, kDequeued, kScratch };
    const void* owner;
    uint64_t first, bytes;
    State state;
    std::vector<Transfer> loads, stores;  // issued and not yet made
};

class Machine {
public:
    Machine(std::vector<Memory> memory, uint64_t ub_bytes, When when, uint32_t seed)
        : memory_(std::move(memory)), ub_bytes_(ub_bytes), when_(when), random_(seed) {}

    // Every block of a launch, one at a time, in an order that the seed decides.
    void Run(uint32_t blocks, const std::function<void()>& kernel) {
        std::vector<uint32_t> order(blocks);
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), random_);
        block_count = blocks;
        for (uint32_t block : order) {
            block_index = block;
            Start();
            kernel();
            Finish();
        }
    }

    uint32_t block_index = 0, block_count = 0;

    // --- Global memory -------------------------------------------------------------------------

    // Where the bytes at an address are.
    uint64_t Global(uint64_t address, uint64_t bytes, bool writes) const {
        for (const Memory& one : memory_)
            if (address >= one.first && address - one.first <= one.bytes
                && bytes <= one.bytes - (address - one.first) && (one.writable || !writes))
                return one.host ? one.host + (address - one.first) : address;
        fault("%s %llu bytes at 0x%llx lies in no allocation of global memory%s",
              writes ? "A write of" : "A read of", (unsigned long long)bytes,
              (unsigned long long)address, writes ? " that may be written" : "");
    }

    // --- Unified buffer ------------------------------------------------------------------------

    uint32_t AddBuffer(const void* owner, uint64_t bytes, Buffer::State state) {
        if (bytes == 0 || bytes % kBlock)
            fault("Expected a buffer of a multiple of 32 bytes, got %llu bytes",
                  (unsigned long long)bytes);
        if (used_ + bytes > ub_bytes_)
            fault("UB overflow: requested %llu bytes, but there are %llu",
                  (unsigned long long)(used_ + bytes), (unsigned long long)ub_bytes_);
        if (buffers_.size() == kMostBuffers) fault("A pipe has at most 64 buffers");
        buffers_.push_back({owner, used_, bytes, state, {}, {}});
        used_ += bytes;
        return static_cast<uint32_t>(buffers_.size() - 1);
    }

    Buffer& At(uint32_t buffer) {
        if (buffer >= buffers_.size())
            fault("Expected a local tensor with a buffer, got a tensor without a buffer");
        return buffers_[buffer];
    }

    // A place in UB as an operation of `bytes` sees it.
    uint8_t* Local(uint32_t buffer, uint64_t offset, uint64_t bytes) {
        const Buffer& one = At(buffer);
        if (offset > one.bytes || bytes > one.bytes - offset)
            fault("%llu bytes at offset %llu run past the end of a UB buffer of %llu bytes",
                  (unsigned long long)bytes, (unsigned long long)offset,
                  (unsigned long long)one.bytes);
        return ub_.get() + one.first + offset;
    }

    // Loads become visible here and not before, unless the copy happened to be early.
    void Complete(std::vector<Transfer>& transfers, bool load) {
        for (const Transfer& one : transfers) Make(one, load);
        transfers.clear();
    }

    void Issue(uint32_t buffer, Transfer one, bool load) {
        Buffer& its = At(buffer);
        one.local += its.first;
        auto& later = load ? its.loads : its.stores;
        const bool now = when_ == When::kAtOnce
            || (when_ == When::kEitherWay && random_() % 2 && later.empty());
        if (now) Make(one, load);
        else later.push_back(one);
    }

    void Poison(uint32_t buffer) {
        const Buffer& one = At(buffer);
        memset(ub_.get() + one.first, kPoison, one.bytes);
    }

    // --- Writes by the scalar unit, which other units see after a flag ---------------------------

    void WrittenByScalar(uint32_t buffer, uint64_t offset, uint64_t bytes) {
        unseen_.push_back({0, At(buffer).first + offset, bytes});
    }

    void CheckSeen(uint32_t buffer, uint64_t offset, uint64_t bytes) {
        const uint64_t first = At(buffer).first + offset;
        for (const Transfer& one : unseen_)
            if (first < one.local + one.bytes && one.local < first + bytes)
                fault("A copy reads UB that the scalar unit wrote, without an S_MTE3 flag between");
    }

    void SetFlag(int event) {
        if (event < 0 || event >= 8) fault("Event %d was set; there are 8", event);
        if (flags_[event]) fault("Event %d was set twice without a wait between", event);
        flags_[event] = true;
        flagged_ = unseen_.size();
    }

    void WaitFlag(int event) {
        if (event < 0 || event >= 8 || !flags_[event])
            fault("Event %d was waited for and never set: the core would hang", event);
        flags_[event] = false;
        unseen_.erase(unseen_.begin(), unseen_.begin() + static_cast<long>(flagged_));
        flagged_ = 0;
    }

private:
    void Start() {
        // Exactly as large as requested: a sanitizer then sees its end too.
        ub_.reset(new uint8_t[ub_bytes_]);
        memset(ub_.get(), kPoison, ub_bytes_);
        buffers_.clear();
        used_ = 0;
        unseen_.clear();
        flagged_ = 0;
        std::fill(std::begin(flags_), std::end(flags_), false);
    }

    void Finish() {
        static const char* const kNames[] = {"free", "allocated", "enqueued", "dequeued", ""};
        for (Buffer& one : buffers_) {
            if (one.state != Buffer::kFree && one.state != Buffer::kScratch)
                fault("A block ended with a buffer still %s: each has to be freed",
                      kNames[one.state]);
            Complete(one.stores, false);
        }
        for (bool flag : flags_)
            if (flag) fault("A block ended with an event that was set and not waited for");
    }

    void Make(const Transfer& one, bool load) {
        uint8_t* local = ub_.get() + one.local;
        auto* global = reinterpret_cast<uint8_t*>(one.global);
        if (load) memcpy(local, global, one.bytes);
        else memcpy(global, local, one.bytes);
    }

    std::vector<Memory> memory_;
    uint64_t ub_bytes_;
    When when_;
    std::mt19937 random_;
    std::unique_ptr<uint8_t[]> ub_;
    std::deque<Buffer> buffers_;
    uint64_t used_ = 0;
    std::vector<Transfer> unseen_;
    size_t flagged_ = 0;
    bool flags_[8] = {};
};

// The machine that the kernel of this thread runs on.
inline thread_local Machine* current = nullptr;

inline Machine& machine() {
    if (current == nullptr) fault("A kernel was called outside of a launch");
    return *current;
}

// Run a kernel; throws `Fault`.
inline void launch(Machine& on, uint32_t blocks, const std::function<void()>& kernel) {
    struct Scope {
        explicit Scope(Machine* one) { current = one; }
        ~Scope() { current = nullptr; }
    } scope(&on);
    on.Run(blocks, kernel);
}

}  // namespace portakv_emulation
