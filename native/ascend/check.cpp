// SPDX-License-Identifier: Apache-2.0
// The kernel matrix: the row kernel on some device, every byte judged.
//
// A case describes a paged cache of several layers and a second side, dense or paged. Where each
// byte must land is computed from that description alone, never from a `Nest`. The same file checks
// our emulation, CANN's CPU twin and an NPU (check_device.h).
#include "check_device.h"

#include <string>

namespace {

typedef std::vector<int64_t> Ids;

// A cache [block][token][head][width], or [block][head][token][width], for each layer.
struct Cache {
    bool heads_first;
    int64_t pad;    // bytes after each row of a head
    int64_t shift;  // distance from an aligned address, in bytes
    int64_t blocks, tokens, heads, width;

    int64_t Pitch() const { return width + pad; }
    int64_t TokenStride() const { return heads_first ? Pitch() : heads * Pitch(); }
    int64_t HeadStride() const { return heads_first ? tokens * Pitch() : Pitch(); }
    int64_t BlockStride() const { return tokens * heads * Pitch(); }
    int64_t Bytes() const { return shift + blocks * BlockStride(); }
    int64_t At(int64_t slot, int64_t head) const {
        return shift + slot / tokens * BlockStride() + slot % tokens * TokenStride()
            + head * HeadStride();
    }
};

struct Case {
    const char* name;
    Cache src, dst;
    Ids src_ids, dst_ids;  // empty: consecutive
    int64_t src_step, dst_step;  // tokens of an id; the lesser is a unit
    int64_t count;         // tokens
    bool wide;             // int64 ids
    int layers;
    int64_t status;        // the lowest status word: the first bad position + 1, or 0

    int64_t Unit() const { return src_step < dst_step ? src_step : dst_step; }
};

int64_t SlotOf(const Ids& ids, int64_t step, int64_t position, int64_t slots) {
    if (ids.empty()) return position;
    const int64_t id = ids[position / step];
    if (id < 0 || id >= slots / step) return -1;
    return id * step + position % step;
}

// One side on the device: an allocation for each layer, its table, its ids.
struct Placed {
    std::vector<std::vector<uint8_t>> host;
    std::vector<void*> memory;
    portakv::Request request;
};

// Mixed well: bytes at a distance of a power of two must differ too.
uint8_t Pattern(int side, int layer, size_t byte) {
    uint32_t mixed = (uint32_t)byte * 2654435761u + (uint32_t)(side * 7 + layer) * 40503u;
    mixed = (mixed ^ mixed >> 15) * 2246822519u;
    return (uint8_t)((mixed ^ mixed >> 13) >> 5);
}

Placed Place(Device& device, const Cache& cache, const Ids& ids, const Case& test, int side) {
    Placed placed;
    for (int layer = 0; layer < test.layers; ++layer) {
        std::vector<uint8_t> bytes(cache.Bytes());
        for (size_t at = 0; at < bytes.size(); ++at) bytes[at] = Pattern(side, layer, at);
        placed.memory.push_back(device.Allocate(bytes.size()));
        device.Upload(placed.memory.back(), bytes.data(), bytes.size());
        placed.host.push_back(bytes);
    }
    void* table = device.Allocate(8 * test.layers);
    std::vector<int64_t> addresses;
    for (void* one : placed.memory) addresses.push_back((int64_t)one);
    device.Upload(table, addresses.data(), 8 * addresses.size());
    void* list = nullptr;
    if (!ids.empty()) {
        const std::vector<int32_t> narrow(ids.begin(), ids.end());
        list = device.Allocate((test.wide ? 8 : 4) * ids.size());
        if (test.wide) device.Upload(list, ids.data(), 8 * ids.size());
        else device.Upload(list, narrow.data(), 4 * narrow.size());
    }
    const int64_t limit = cache.blocks * cache.tokens / test.Unit();
    placed.request = {(int64_t)table, cache.shift, (int64_t)list, test.wide, 0, limit};
    return placed;
}

portakv::Side SideOf(const Cache& cache, const Ids& ids, int64_t step, int64_t unit) {
    portakv::Side side = {};
    side.per_id = ids.empty() ? 0 : step / unit;
    side.steps = 2;
    side.units[0] = {0, 0, cache.BlockStride()};
    side.units[1] = {cache.tokens / unit, 0, cache.TokenStride() * unit};
    return side;
}

portakv::Nest NestOf(const Case& test) {
    const Cache &src = test.src, &dst = test.dst;
    portakv::Nest nest = {};
    nest.unit = test.Unit();
    nest.src = SideOf(src, test.src_ids, test.src_step, nest.unit);
    nest.dst = SideOf(dst, test.dst_ids, test.dst_step, nest.unit);
    nest.run = src.width;
    nest.rows = src.heads;
    nest.src_stride = src.HeadStride();
    nest.dst_stride = dst.HeadStride();
    nest.loop[nest.loops++] = {test.layers, 1, 0, 1, 0};
    if (nest.unit > 1)
        nest.loop[nest.loops++] = {nest.unit, 0, src.TokenStride(), 0, dst.TokenStride()};
    return nest;
}

// Every byte of the destination as it must be, and none of the source changed.
bool IsRight(Device& device, const Case& test, Placed& src, Placed& dst) {
    const int64_t src_slots = test.src.blocks * test.src.tokens;
    const int64_t dst_slots = test.dst.blocks * test.dst.tokens;
    for (int64_t position = 0; position < test.count; ++position) {
        const int64_t from = SlotOf(test.src_ids, test.src_step, position, src_slots);
        const int64_t to = SlotOf(test.dst_ids, test.dst_step, position, dst_slots);
        if (from < 0 || to < 0) continue;
        for (int layer = 0; layer < test.layers; ++layer)
            for (int64_t head = 0; head < test.src.heads; ++head)
                memcpy(&dst.host[layer][test.dst.At(to, head)],
                       &src.host[layer][test.src.At(from, head)], test.src.width);
    }
    for (Placed* side : {&src, &dst})
        for (int layer = 0; layer < test.layers; ++layer) {
            std::vector<uint8_t> found(side->host[layer].size());
            device.Download(found.data(), side->memory[layer], found.size());
            for (size_t at = 0; at < found.size(); ++at)
                if (found[at] != side->host[layer][at]) {
                    printf("  %s: byte %zu of layer %d of the %s is 0x%02x, expected 0x%02x\n",
                           test.name, at, layer, side == &src ? "source" : "destination",
                           found[at], side->host[layer][at]);
                    return false;
                }
        }
    return true;
}

bool Passes(Device& device, const Case& test, uint32_t blocks, uint32_t ub, int turn) {
    Placed src = Place(device, test.src, test.src_ids, test, 0);
    Placed dst = Place(device, test.dst, test.dst_ids, test, 1);
    const portakv::Nest nest = NestOf(test);
    void* uploaded = device.Allocate(sizeof nest);
    device.Upload(uploaded, &nest, sizeof nest);
    std::vector<int64_t> words(blocks, 0);  // one for each core
    void* word = device.Allocate(sizeof(int64_t) * blocks);
    device.Upload(word, words.data(), sizeof(int64_t) * blocks);
    const portakv::Copy copy = {(int64_t)uploaded, src.request, dst.request,
                                test.count / nest.unit, (int64_t)word};
    const char* why = device.Launch(copy, blocks, ub, turn);
    bool right = why == nullptr;
    if (!right) printf("  %s: %s\n", test.name, why);
    if (right) {
        device.Download(words.data(), word, sizeof(int64_t) * blocks);
        int64_t status = 0;
        for (const int64_t one : words)
            if (one != 0 && (status == 0 || one < status)) status = one;
        right = status == test.status;
        if (!right)
            printf("  %s: the lowest status word is %lld, expected %lld\n", test.name,
                   (long long)status, (long long)test.status);
    }
    right = right && IsRight(device, test, src, dst);
    device.FreeAll();
    return right;
}

Ids Backwards(int64_t count) {
    Ids ids;
    while (count) ids.push_back(--count);
    return ids;
}

std::vector<Case> Cases() {
    const Cache nhd = {false, 0, 0, 6, 16, 4, 64}, hnd = {true, 0, 0, 6, 16, 4, 64};
    const Cache dense = {false, 0, 0, 1, 32, 4, 64};
    const Ids slots = {17, 3, -1, 95, 0, 44, -7, 16, 31, 32};
    const Ids wild = {17, 3, 96, 95, 0, 44, 5, 16, 31, 32};
    const auto with = [](Cache cache, int64_t width, int64_t pad, int64_t shift) {
        cache.width = width;
        cache.pad = pad;
        cache.shift = shift;
        return cache;
    };
    std::vector<Case> cases = {
        {"gather tokens", nhd, dense, slots, {}, 1, 1, 10, true, 3, 0},
        {"scatter tokens", dense, nhd, {}, slots, 1, 1, 10, false, 3, 0},
        {"gather from heads first", hnd, dense, slots, {}, 1, 1, 10, false, 3, 0},
        {"scatter to heads first", dense, hnd, {}, slots, 1, 1, 10, true, 3, 0},
        {"both sides by slots", nhd, hnd, slots, Backwards(10), 1, 1, 10, true, 2, 0},
        {"a slot past the end", nhd, dense, wild, {}, 1, 1, 10, true, 3, 3},
        {"a slot past the end, scattered", dense, nhd, {}, wild, 1, 1, 10, false, 3, 3},
        {"a wild slot", nhd, dense, {5, INT64_MAX, 4}, {}, 1, 1, 3, true, 1, 2},
        {"blocks", nhd, nhd, {5, -1, 0}, {2, 3, 4}, 16, 16, 48, true, 3, 0},
        {"blocks to heads first", nhd, hnd, {5, 1, 0}, {2, 3, -4}, 16, 16, 48, false, 3, 0},
        {"a block past the end", nhd, hnd, {5, 1}, {2, 6}, 16, 16, 32, false, 3, 17},
        {"neither side by ids", dense, dense, {}, {}, 1, 1, 32, false, 2, 0},
        {"nothing", nhd, dense, {}, {}, 1, 1, 0, false, 2, 0},
        {"blocks to slots", nhd, hnd, {5, -1, 0}, Backwards(48), 16, 1, 48, true, 2, 0},
        {"slots to blocks", hnd, nhd, Backwards(48), {5, 1, 0}, 1, 16, 48, false, 2, 0},
        {"a wild block", nhd, dense, {5, (INT64_MAX >> 4) + 2}, {}, 16, 1, 32, true, 1, 17},
        {"padding", with(nhd, 64, 32, 0), dense, slots, {}, 1, 1, 10, true, 3, 0},
        {"padding of odd bytes", with(nhd, 64, 8, 0), dense, slots, {}, 1, 1, 10, true, 3, 0},
    };
    // Widths and addresses that plain copies cannot take.
    static const int64_t kWidths[] = {1, 2, 31, 33, 100, 132};
    for (int64_t width : kWidths) {
        const Cache odd = with(nhd, width, 3, 0), rows = with(dense, width, 0, 0);
        cases.push_back({"gather odd widths", odd, rows, slots, {}, 1, 1, 10, true, 2, 0});
        cases.push_back({"scatter odd widths", rows, odd, {}, slots, 1, 1, 10, true, 2, 0});
    }
    for (int64_t shift : {1, 2, 16}) {
        const Cache odd = with(nhd, 64, 0, shift);
        cases.push_back({"gather at odd addresses", odd, dense, slots, {}, 1, 1, 10, true, 2, 0});
        cases.push_back({"scatter at odd addresses", dense, odd, {}, slots, 1, 1, 10, true, 2, 0});
    }
    // Runs and rows that no buffer holds, and more rows than one transfer takes.
    const Cache wide = {false, 0, 0, 3, 2, 1, 200000}, many = {true, 0, 0, 2, 2, 5000, 32};
    const Cache thin = {true, 1, 0, 2, 2, 5000, 3};
    const Cache far = {true, 0, 0, 2, 40000, 2, 64};
    cases.push_back({"long runs", wide, wide, {5, 0}, {1, 2}, 1, 1, 2, true, 1, 0});
    cases.push_back({"many rows", many, many, {3, 0}, {1, 2}, 1, 1, 2, true, 1, 0});
    cases.push_back({"many thin rows", thin, thin, {3, 0}, {1, 2}, 1, 1, 2, true, 1, 0});
    cases.push_back({"rows far apart", far, dense, {79999, 0}, {}, 1, 1, 2, true, 1, 0});
    cases.back().dst.heads = 2;
    return cases;
}

}  // namespace

// With any argument it stops at the first failure.
int main(int words, char**) {
    Device device;
    const uint32_t usual = device.ub_bytes;
    const struct { uint32_t blocks, ub; } settings[] = {
        {device.cores, usual}, {1, usual}, {3, 1024}, {device.cores, 4128},
        {2, device.most_ub}};
    int passed = 0, failed = 0;
    for (const Case& test : Cases())
        for (const auto& setting : settings)
            for (int turn = 0; turn < Device::Turns(); ++turn) {
                ++(Passes(device, test, setting.blocks, setting.ub, turn) ? passed : failed);
                if (failed && words > 1) return 1;
            }
    printf("kernel matrix, %s: %d passed, %d failed\n", Device::Name(), passed, failed);
    return failed != 0;
}
