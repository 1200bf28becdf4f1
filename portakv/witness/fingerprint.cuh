// SPDX-License-Identifier: Apache-2.0
// Fingerprints of blocks: each word is read once, multiplied by the keys of its position, and added
// to the sum of its head and to the sum of its segment of tokens (fingerprint.py defines the sums).
//
// A thread block sums one plane of one block: the rows of one layer and one kv. A row is one token
// of one head. Lanes, threads side by side, read the vectors of a row; each thread reads the same
// columns of several rows, so that it computes the keys of a column once. All sums are modulo 2^64,
// so that their order does not matter.
//
// words.cuh stands before this text; fingerprint.py defines the sizes and packs the tables.

namespace portakv {
namespace fingerprints {

using sums::i64;
using sums::u64;

constexpr unsigned THREADS = PORTAKV_SUM_THREADS;  // of a block: a power of 2
constexpr unsigned ROWS = 4;                       // that a thread reads together

// The rows of one kv.
struct Plane {
    i64 vector;         // bytes: 16 are four words, 4, 2 and 1 are one word
    i64 columns;        // vectors of a row
    i64 lanes;          // threads side by side in a row: a power of 2
    const i64* layers;  // the address of each layer
    const i64* tokens;  // the offset of each token of a block
    const i64* heads;   // the offset of each head
    const i64* vectors; // the offset of each vector of a row; null if a row is one run of bytes
};
static_assert(sizeof(Plane) == 56, "as the host packs it");

struct Blocks {
    const Plane* planes;
    const i64* offsets;  // [kv, blocks]: of each block
    u64* sums;           // [blocks, layers * kv * (heads + segments)]
    const u64* keys;     // of the tokens, of the tokens of a segment, of the heads
    i64 blocks, layers, kv, tokens, heads, segments;
};
static_assert(sizeof(Blocks) == 80, "as the host packs it");

// The rows that a thread block reads together.
struct Tile {
    unsigned first, count;  // rows of the plane; a row is head * tokens + token
    unsigned lanes;
};

template <class V>
__device__ __forceinline__ void sum_rows(
    const Blocks& all, const Plane& plane, const char* at, const Tile& tile, u64* partial) {
    const unsigned lane = threadIdx.x % tile.lanes, side = THREADS / tile.lanes;
    const unsigned own = threadIdx.x / tile.lanes;
    const char* rows[ROWS];
    u64 sums[ROWS];
    PORTAKV_UNROLL
    for (unsigned nth = 0; nth < ROWS; ++nth) {
        const unsigned row = own + nth * side;
        // Rows past the end read the first one, so that loads need no condition.
        const unsigned number = tile.first + (row < tile.count ? row : 0);
        const unsigned tokens = (unsigned)all.tokens;
        rows[nth] = at + plane.heads[number / tokens] + plane.tokens[number % tokens];
        sums[nth] = 0;
    }
    for (unsigned column = lane; column < plane.columns; column += tile.lanes) {
        u64 keys[V::words];
        PORTAKV_UNROLL
        for (int nth = 0; nth < V::words; ++nth)
            keys[nth] = sums::key_of((i64)column * V::words + nth);
        const i64 offset = plane.vectors ? plane.vectors[column] : column * plane.vector;
        typename V::type vectors[ROWS];
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < ROWS; ++nth) vectors[nth] = sums::load<V>(rows[nth] + offset);
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < ROWS; ++nth) {
            PORTAKV_UNROLL
            for (int word = 0; word < V::words; ++word)
                sums[nth] += V::word(vectors[nth], word) * keys[word];
        }
    }
    PORTAKV_UNROLL
    for (unsigned nth = 0; nth < ROWS; ++nth)
        partial[(own + nth * side) * tile.lanes + lane] = sums[nth];
}

// Add up the lanes of each row; the first lane gets the sum.
__device__ __forceinline__ void add_lanes(const Tile& tile, u64* partial) {
    for (unsigned half = tile.lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        for (unsigned nth = threadIdx.x; nth < tile.count * half; nth += THREADS) {
            u64* sum = partial + nth / half * tile.lanes + nth % half;
            sum[0] += sum[half];
        }
    }
    __syncthreads();
}

// The tokens of a head that a tile has, of those in a range.
struct Tokens { unsigned first, past; };

__device__ __forceinline__ Tokens
tokens_of(const Tile& tile, unsigned tokens, unsigned head, unsigned first, unsigned past) {
    const unsigned begin = head * tokens, end = tile.first + tile.count;
    if (tile.first > begin + first) first = tile.first - begin;
    if (end < begin + past) past = end > begin ? end - begin : 0;
    return {first, past};
}

// Return the part of the sum of a head that a tile has.
__device__ __forceinline__ u64
sum_of_head(const Blocks& all, const Tile& tile, const u64* partial, unsigned head) {
    const unsigned tokens = (unsigned)all.tokens;
    const Tokens some = tokens_of(tile, tokens, head, 0, tokens);
    u64 sum = 0;
    for (unsigned token = some.first; token < some.past; ++token)
        sum += partial[(head * tokens + token - tile.first) * tile.lanes] * all.keys[token];
    return sum;
}

// Return the part of the sum of a segment of tokens that a tile has.
__device__ __forceinline__ u64
sum_of_segment(const Blocks& all, const Tile& tile, const u64* partial, unsigned segment) {
    const unsigned tokens = (unsigned)all.tokens, each = tokens / (unsigned)all.segments;
    const unsigned first = segment * each;
    const u64* keys = all.keys + tokens;
    u64 total = 0;
    for (unsigned head = 0; head < all.heads; ++head) {
        const Tokens some = tokens_of(tile, tokens, head, first, first + each);
        u64 sum = 0;
        for (unsigned token = some.first; token < some.past; ++token)
            sum += partial[(head * tokens + token - tile.first) * tile.lanes] * keys[token - first];
        total += sum * keys[each + head];
    }
    return total;
}

}  // namespace fingerprints
}  // namespace portakv

extern "C" __global__ void PORTAKV_AT_MOST(PORTAKV_SUM_THREADS)
portakv_fingerprints(PORTAKV_CONSTANT const portakv::fingerprints::Blocks all) {
    using namespace portakv::fingerprints;
    __shared__ u64 partial[THREADS * ROWS];
    const unsigned kv = blockIdx.x % (unsigned)all.kv;
    const unsigned layer = blockIdx.x / (unsigned)all.kv % (unsigned)all.layers;
    const i64 block = blockIdx.x / (unsigned)(all.kv * all.layers);
    const Plane& plane = all.planes[kv];
    const char* at = (const char*)(plane.layers[layer] + all.offsets[kv * all.blocks + block]);

    // The sums of a block: of each layer, kv and head; then of each layer, kv and segment.
    const unsigned heads = (unsigned)all.heads, segments = (unsigned)all.segments;
    const unsigned planes = (unsigned)(all.layers * all.kv), number = layer * (unsigned)all.kv + kv;
    u64* sums = all.sums + block * planes * (heads + segments);
    u64* by_head = sums + number * heads;
    u64* by_segment = sums + planes * heads + number * segments;

    Tile tile;
    tile.lanes = (unsigned)plane.lanes;
    const unsigned rows = heads * (unsigned)all.tokens, most = THREADS * ROWS / tile.lanes;
    for (tile.first = 0; tile.first < rows; tile.first += most) {
        tile.count = rows - tile.first < most ? rows - tile.first : most;
        if (plane.vector == 16) sum_rows<portakv::sums::Four>(all, plane, at, tile, partial);
        else if (plane.vector == 4)
            sum_rows<portakv::sums::Single<int>>(all, plane, at, tile, partial);
        else if (plane.vector == 2)
            sum_rows<portakv::sums::Single<short>>(all, plane, at, tile, partial);
        else sum_rows<portakv::sums::Single<signed char>>(all, plane, at, tile, partial);
        add_lanes(tile, partial);

        // The thread that writes a sum is the same for all tiles.
        for (unsigned nth = threadIdx.x; nth < heads + segments; nth += THREADS) {
            u64* sum = nth < heads ? by_head + nth : by_segment + (nth - heads);
            const u64 part = nth < heads ? sum_of_head(all, tile, partial, nth)
                                         : sum_of_segment(all, tile, partial, nth - heads);
            *sum = (tile.first ? *sum : 0) + part;
        }
        __syncthreads();
    }
}
