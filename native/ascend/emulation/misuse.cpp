// SPDX-License-Identifier: Apache-2.0
// Tests of the emulation's checks: small kernels that misuse the API, and the fault that each must
// raise. The first kernel follows the rules: a machine that rejects everything does not pass.
#include "bench.h"

namespace {

struct Misuse {
    const char* name;
    const char* fault;  // part of the sentence; null: no fault
    void (*kernel)();
};

const DataCopyPadExtParams<uint8_t> kNoFill(false, 0, 0, 0);

const Misuse kMisuses[] = {
    {"a kernel that keeps the rules", nullptr, [] {
        Kernel k;
        for (int turn = 0; turn < 3; ++turn) {
            LocalTensor<uint8_t> tile = k.Loaded(256);
            DataCopy(k.into, tile, 256);
            k.queue.FreeTensor(tile);
        }
        k.scratch.Get<int64_t>().SetValue(0, 1);
        Flag();
        DataCopyPad(k.into, k.scratch.Get<uint8_t>(), DataCopyExtParams(1, 8, 0, 0, 0));
    }},
    // Alignment and lengths
    {"a length that is no multiple of 32", "no multiple of 32", [] { Kernel().Loaded(40); }},
    {"a UB address that is no multiple of 32", "no multiple of 32", [] {
        Kernel k;
        DataCopy(k.queue.AllocTensor<uint8_t>()[8], k.from, 32);
    }},
    {"a UB address in a store", "no multiple of 32", [] {
        Kernel k;
        DataCopyPad(k.into, k.Loaded()[4], DataCopyExtParams(1, 8, 0, 0, 0));
    }},
    {"a buffer of a length that is no multiple of 32", "got 40 bytes", [] { Kernel(1, 40); }},
    {"a global address that the elements do not allow", "elements do not allow", [] {
        GlobalTensor<int64_t> words;
        words.SetGlobalBuffer((int64_t*)(bench.source + 4));
    }},
    {"a padded copy that cuts an element", "cuts an element", [] {
        Kernel k;
        GlobalTensor<int32_t> words;
        words.SetGlobalBuffer((int32_t*)bench.source);
        LocalTensor<int32_t> tile = k.queue.AllocTensor<int32_t>();
        DataCopyPad(tile, words, DataCopyExtParams(1, 6, 0, 0, 0),
                    DataCopyPadExtParams<int32_t>(false, 0, 0, 0));
    }},
    {"no blocks", "1 to 4095", [] {
        Kernel k;
        DataCopy(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyParams(0, 1, 0, 0));
    }},
    {"more blocks than 12 bits count", "1 to 4095", [] {
        Kernel k;
        DataCopy(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyParams(4096, 1, 0, 0));
    }},
    {"blocks of no length", "length 0", [] {
        Kernel k;
        DataCopyPad(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyExtParams(1, 0, 0, 0, 0),
                    kNoFill);
    }},
    {"a padded block longer than 21 bits count", "2097151", [] {
        Kernel k;
        DataCopyPad(k.queue.AllocTensor<uint8_t>(), k.from,
                    DataCopyExtParams(1, 2097152, 0, 0, 0), kNoFill);
    }},
    {"filling, which is not emulated", "not emulated", [] {
        Kernel k;
        DataCopyPad(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyExtParams(1, 8, 0, 0, 0),
                    DataCopyPadExtParams<uint8_t>(true, 0, 24, 0));
    }},
    // The unified buffer
    {"UB overflow", "UB overflow", [] { Kernel(2, 2048); }},
    {"more buffers than a pipe has", "at most 64", [] { Kernel(64, 32); }},
    {"a copy past the end of a UB buffer", "past the end of a UB buffer", [] {
        Kernel k(2, 64);
        DataCopy(k.queue.AllocTensor<uint8_t>(), k.from, 96);
    }},
    {"a padded row whose padding is past the end", "past the end of a UB buffer", [] {
        Kernel k(2, 64);
        DataCopyPad(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyExtParams(3, 1, 0, 0, 0),
                    kNoFill);
    }},
    {"a tensor that begins past the end", "past the end of a UB buffer", [] {
        Kernel k(2, 64);
        k.queue.AllocTensor<uint8_t>()[65];
    }},
    {"a scalar past the end", "past the end of a UB buffer", [] {
        Kernel().scratch.Get<int64_t>().SetValue(4, 1);
    }},
    {"a tensor without a buffer", "got a tensor without a buffer", [] {
        Kernel k;
        DataCopy(LocalTensor<uint8_t>(), k.from, 32);
    }},
    {"a queue without buffers", "no free buffer", [] {
        Kernel(0).queue.AllocTensor<uint8_t>();
    }},
    {"a queue initialised twice", "second time", [] {
        Kernel k;
        k.pipe.InitBuffer(k.queue, 1, 32);
    }},
    // Queue discipline
    {"a store without EnQue and DeQue", "not enqueued and dequeued", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.queue.AllocTensor<uint8_t>();
        DataCopy(tile, k.from, 32);
        DataCopy(k.into, tile, 32);
    }},
    {"a store after EnQue alone", "not enqueued and dequeued", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.queue.AllocTensor<uint8_t>();
        k.queue.EnQue(tile);
        DataCopy(k.into, tile, 32);
    }},
    {"a store after FreeTensor", "not enqueued and dequeued", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.Loaded();
        k.queue.FreeTensor(tile);
        DataCopy(k.into, tile, 32);
    }},
    {"a load into a tensor that was enqueued", "not allocated from a queue", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.Loaded();
        DataCopy(tile, k.from, 32);
    }},
    {"a load into scratch memory", "not allocated from a queue", [] {
        Kernel k;
        DataCopy(k.scratch.Get<uint8_t>(), k.from, 32);
    }},
    {"DeQue of an empty queue", "would hang", [] { Kernel().queue.DeQue<uint8_t>(); }},
    {"AllocTensor without FreeTensor", "would hang", [] {
        Kernel k;
        for (int turn = 0; turn < 3; ++turn) k.Loaded();
    }},
    {"more tensors enqueued than the queue is deep", "depth of the queue", [] {
        Kernel k;
        for (int turn = 0; turn < 2; ++turn) k.queue.EnQue(k.queue.AllocTensor<uint8_t>());
    }},
    {"EnQue twice", "enqueued and not allocated", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.queue.AllocTensor<uint8_t>();
        k.queue.EnQue(tile);
        k.queue.EnQue(tile);
    }},
    {"FreeTensor twice", "free and not dequeued", [] {
        Kernel k;
        LocalTensor<uint8_t> tile = k.Loaded();
        k.queue.FreeTensor(tile);
        k.queue.FreeTensor(tile);
    }},
    {"FreeTensor of another queue's tensor", "another queue", [] {
        Kernel k;
        Queue other;
        k.pipe.InitBuffer(other, 1, 64);
        LocalTensor<uint8_t> tile = k.Loaded();
        other.FreeTensor(tile);
    }},
    {"a tensor never freed", "still dequeued", [] { Kernel().Loaded(); }},
    {"a tensor never dequeued", "still enqueued", [] {
        Kernel k;
        k.queue.EnQue(k.queue.AllocTensor<uint8_t>());
    }},
    {"a tensor never enqueued", "still allocated", [] { Kernel().queue.AllocTensor<uint8_t>(); }},
    // Events
    {"a scalar write that no flag announces", "without an S_MTE3 flag", [] {
        Kernel k;
        k.scratch.Get<int64_t>().SetValue(0, 1);
        DataCopyPad(k.into, k.scratch.Get<uint8_t>(), DataCopyExtParams(1, 8, 0, 0, 0));
    }},
    {"a scalar write after the flag", "without an S_MTE3 flag", [] {
        Kernel k;
        SetFlag<HardEvent::S_MTE3>(0);
        k.scratch.Get<int64_t>().SetValue(0, 1);
        WaitFlag<HardEvent::S_MTE3>(0);
        DataCopyPad(k.into, k.scratch.Get<uint8_t>(), DataCopyExtParams(1, 8, 0, 0, 0));
    }},
    {"a wait for an event that is never set", "would hang", [] {
        Kernel k;
        WaitFlag<HardEvent::S_MTE3>(0);
    }},
    {"an event set twice", "set twice", [] {
        Kernel k;
        SetFlag<HardEvent::S_MTE3>(0);
        SetFlag<HardEvent::S_MTE3>(0);
    }},
    {"an event that does not exist", "there are 8", [] {
        Kernel k;
        SetFlag<HardEvent::S_MTE3>(8);
    }},
    {"an event never waited for", "not waited for", [] {
        Kernel k;
        SetFlag<HardEvent::S_MTE3>(0);
    }},
    // Global memory
    {"a read past the end of an allocation", "A read of 32 bytes", [] {
        Kernel k;
        DataCopy(k.queue.AllocTensor<uint8_t>(), k.from[kBytes], 32);
    }},
    {"a read that begins inside and ends outside", "A read of 64 bytes", [] {
        Kernel k;
        DataCopy(k.queue.AllocTensor<uint8_t>(), k.from[kBytes - 32], 64);
    }},
    {"a row past the end", "A read of 8 bytes", [] {
        Kernel k;
        DataCopyPad(k.queue.AllocTensor<uint8_t>(), k.from, DataCopyExtParams(2, 8, 248, 0, 0),
                    kNoFill);
    }},
    {"a write past the end of an allocation", "A write of 32 bytes", [] {
        Kernel k;
        DataCopy(k.into[kBytes], k.Loaded(), 32);
    }},
    {"a write to what may only be read", "may be written", [] {
        Kernel k;
        DataCopy(k.from, k.Loaded(), 32);
    }},
    {"a scalar read outside all memory", "A read of 4 bytes", [] {
        GlobalTensor<int32_t> ids;
        ids.SetGlobalBuffer((int32_t*)bench.beyond);
        ids.GetValue(0);
    }},
    {"a scalar read before an allocation", "A read of 1 bytes", [] {
        GlobalTensor<uint8_t> ids;
        ids.SetGlobalBuffer(bench.source - 1);
        ids.GetValue(0);
    }},
    {"past the end that the tensor was given", "past the end of a global tensor", [] {
        GlobalTensor<uint8_t> ids;
        ids.SetGlobalBuffer(bench.source, 16);
        ids.GetValue(16);
    }},
    {"a global tensor that begins after its end", "after its buffer's end", [] {
        GlobalTensor<uint8_t> ids;
        ids.SetGlobalBuffer(bench.source, 16);
        ids[17];
    }},
};

int failures = 0;

void Expect(bool held, const char* name, const std::string& found) {
    if (held) return;
    ++failures;
    printf("  NOT CAUGHT: %s (%s)\n", name, found.empty() ? "no fault" : found.c_str());
}

// --- Tests by bytes ---------------------------------------------------------------------------

bool TargetIs(uint8_t value, size_t bytes) {
    for (size_t at = 0; at < bytes; ++at)
        if (bench.target[at] != value) return false;
    return true;
}

// A load is not there before DeQue, and a store not before the buffer is allocated again.
void ShowsLateCopies() {
    Reset();
    uint8_t before = 0, after = 0, stored = 0;
    static uint8_t *seen_before, *seen_after, *seen_stored;
    seen_before = &before, seen_after = &after, seen_stored = &stored;
    const auto kernel = [] {
        Kernel k(1);
        LocalTensor<uint8_t> tile = k.queue.AllocTensor<uint8_t>();
        DataCopy(tile, k.from, 32);
        *seen_before = tile.GetValue(0);
        k.queue.EnQue(tile);
        tile = k.queue.DeQue<uint8_t>();
        *seen_after = tile.GetValue(0);
        DataCopy(k.into, tile, 32);
        *seen_stored = bench.target[0];
        k.queue.FreeTensor(tile);
    };
    std::string fault = FaultOf(kernel, When::kAsLateAsAllowed);
    Expect(fault.empty() && before == 0xCD && after == 0x11, "a load visible before DeQue", fault);
    Expect(stored == 0x22 && TargetIs(0x11, 32), "a store that is done when it is issued", fault);
    Reset();
    fault = FaultOf(kernel, When::kAtOnce);
    Expect(fault.empty() && before == 0x11 && stored == 0x11, "an immediate copy", fault);
}

// Bytes that nothing brought are poison, also if the buffer held others before.
void ShowsPoison() {
    Reset();
    const std::string fault = FaultOf([] {
        Kernel k(1);
        for (uint32_t bytes : {64u, 32u}) {
            LocalTensor<uint8_t> tile = k.Loaded(bytes);
            DataCopy(k.into, tile, 64);
            k.queue.FreeTensor(tile);
        }
    }, When::kEitherWay);
    Expect(fault.empty() && TargetIs(0x11, 32) && bench.target[32] == 0xCD, "stale bytes in UB",
           fault);
}

// The API exists inside of a launch only.
void ShowsLaunches() {
    bool caught = false;
    try {
        GetBlockIdx();
    } catch (const Fault&) {
        caught = true;
    }
    Expect(caught, "a kernel called outside of a launch", "");
}

// Blocks run in another order for another seed, each of them once.
void ShowsShuffledBlocks() {
    static std::vector<int64_t> order;
    std::vector<std::vector<int64_t>> orders;
    for (uint32_t seed : {1u, 2u}) {
        order.clear();
        FaultOf([] { order.push_back(GetBlockIdx()); }, When::kAtOnce, 8, seed);
        orders.push_back(order);
    }
    bool right = orders[0] != orders[1] && orders[0].size() == 8;
    std::sort(orders[0].begin(), orders[0].end());
    for (int64_t at = 0; right && at < 8; ++at) right = orders[0][at] == at;
    Expect(right, "blocks in a fixed order", "");
}

}  // namespace

int main() {
    int shown = 0;
    for (const Misuse& misuse : kMisuses)
        for (When when : {When::kAtOnce, When::kAsLateAsAllowed, When::kEitherWay}) {
            Reset();
            const std::string found = FaultOf(misuse.kernel, when);
            Expect(misuse.fault ? found.find(misuse.fault) != std::string::npos : found.empty(),
                   misuse.name, found);
            ++shown;
        }
    ShowsLateCopies();
    ShowsPoison();
    ShowsShuffledBlocks();
    ShowsLaunches();
    printf("misuse of the API: %d runs of %zu kernels and 6 by bytes, %d not as expected\n", shown,
           sizeof kMisuses / sizeof *kMisuses, failures);
    return failures != 0;
}
