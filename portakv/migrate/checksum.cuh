// SPDX-License-Identifier: Apache-2.0
// Checksums of parts of tensors: each word is read once, multiplied by the keys of its position and
// added to the sum of its part (checksum.py defines the sum).
//
// A part is rows of columns. A column is one vector of words. A thread block sums one tile of a
// part. It first computes the key and the offset of each row of the tile, in shared memory. Then a
// thread sums down its columns, and multiplies by the key of a column once. In a part of few rows a
// thread sums along each row instead, and multiplies each word by the key of its column. All sums
// are modulo 2^64, so that their order does not matter.
//
// Raw pointers and integers only: this text builds under NVRTC, nvcc, hipRTC and hipcc. It does not
// depend on the width of a warp. words.cuh of portakv.runtime stands before it; checksum.py
// defines the sizes and packs the tables.

namespace portakv {
namespace sums {

constexpr unsigned THREADS = PORTAKV_SUM_THREADS;  // of a block: a power of 2
constexpr unsigned ROWS = PORTAKV_SUM_ROWS;        // the most rows of a tile
constexpr int AXES = PORTAKV_SUM_AXES;             // the most axes of rows

// An axis of rows: its positions, the bytes from one to the next, and the number of the first.
struct Axis { i64 extent, stride, first; };

// The shape of parts, and its division into tiles.
struct Shape {
    i64 vector;        // bytes: 16 are four words, 4, 2 and 1 are one word
    u64 factor;        // of the whole part: the keys of axes with one position
    i64 rows;
    i64 columns;       // vectors of a row
    i64 step;          // bytes from column to column
    i64 first;         // number of the first word's position in a row
    i64 lanes;         // threads side by side in a row: a power of 2
    i64 tile_rows;
    i64 tile_columns;
    i64 across;        // tiles side by side
    i64 flat;          // 1: few rows, so that a thread sums along each row
    i64 axes;          // of rows
    Axis axis[AXES];   // outermost first
};
static_assert(sizeof(Shape) == 8 * (12 + 3 * AXES), "as the host packs it");

struct Part {
    const char* at;
    i64 shape;         // its number in the table of shapes
    u64 sum;           // 0 before the launch
};

struct Sums {
    const Shape* shapes;
    Part* parts;
    const u64* tiles;  // for each block: the number of a part << 32 | the number of its tile
};
static_assert(sizeof(Part) == 24 && sizeof(Sums) == 24, "as the host packs them");

// The part of a tile that a block sums.
struct Tile {
    const char* at;    // of the first column
    i64 step, first;
    unsigned rows, columns, lanes;
};

struct Rows {
    u64 key[ROWS];
    i64 offset[ROWS];  // in bytes
};

// Add the words of one column, times the keys of their positions.
template <class V>
__device__ __forceinline__ void add_column(u64& sum, const typename V::type& vector, i64 first) {
    PORTAKV_UNROLL
    for (int nth = 0; nth < V::words; ++nth) sum += V::word(vector, nth) * key_of(first + nth);
}

// Sum along each row.
template <class V> __device__ __forceinline__ u64 along_rows(const Tile& tile, const Rows& rows) {
    u64 total = 0;
    for (unsigned row = 0; row < tile.rows; ++row) {
        const char* at = tile.at + rows.offset[row];
        u64 sum = 0;
        unsigned column = threadIdx.x;
        for (; column + (V::batch - 1) * THREADS < tile.columns; column += V::batch * THREADS) {
            typename V::type vectors[V::batch];
            PORTAKV_UNROLL
            for (unsigned nth = 0; nth < V::batch; ++nth)
                vectors[nth] = load<V>(at + (column + nth * THREADS) * tile.step);
            PORTAKV_UNROLL
            for (unsigned nth = 0; nth < V::batch; ++nth)
                add_column<V>(sum, vectors[nth], tile.first + (column + nth * THREADS) * V::words);
        }
        for (; column < tile.columns; column += THREADS)
            add_column<V>(sum, load<V>(at + column * tile.step), tile.first + column * V::words);
        total += sum * rows.key[row];
    }
    return total;
}

// Add the words of a row to the sums of their columns.
template <class V>
__device__ __forceinline__ void add_row(u64* sums, const typename V::type& vector, u64 key) {
    PORTAKV_UNROLL
    for (int nth = 0; nth < V::words; ++nth) sums[nth] += V::word(vector, nth) * key;
}

// Sum down columns.
template <class V> __device__ __forceinline__ u64 down_columns(const Tile& tile, const Rows& rows) {
    const unsigned lines = THREADS / tile.lanes;  // rows that are read side by side
    u64 total = 0;
    for (unsigned column = threadIdx.x % tile.lanes; column < tile.columns; column += tile.lanes) {
        const char* at = tile.at + column * tile.step;
        u64 sums[V::words];
        PORTAKV_UNROLL
        for (int nth = 0; nth < V::words; ++nth) sums[nth] = 0;
        unsigned row = threadIdx.x / tile.lanes;
        for (; row + (V::batch - 1) * lines < tile.rows; row += V::batch * lines) {
            typename V::type vectors[V::batch];
            PORTAKV_UNROLL
            for (unsigned nth = 0; nth < V::batch; ++nth)
                vectors[nth] = load<V>(at + rows.offset[row + nth * lines]);
            PORTAKV_UNROLL
            for (unsigned nth = 0; nth < V::batch; ++nth)
                add_row<V>(sums, vectors[nth], rows.key[row + nth * lines]);
        }
        for (; row < tile.rows; row += lines)
            add_row<V>(sums, load<V>(at + rows.offset[row]), rows.key[row]);
        const i64 first = tile.first + column * V::words;
        PORTAKV_UNROLL
        for (int nth = 0; nth < V::words; ++nth) total += sums[nth] * key_of(first + nth);
    }
    return total;
}

template <class V>
__device__ __forceinline__ u64 sum_of(const Shape& shape, const Tile& tile, const Rows& rows) {
    return shape.flat ? along_rows<V>(tile, rows) : down_columns<V>(tile, rows);
}

// Compute the key and the offset of each row of a tile, a row for each thread.
__device__ __forceinline__ void prepare(const Shape& shape, i64 first, unsigned count, Rows& rows) {
    for (unsigned nth = threadIdx.x; nth < count; nth += THREADS) {
        i64 number = first + nth, offset = 0;
        u64 key = 1;
        for (i64 at = shape.axes - 1; at >= 0; --at) {
            const Axis& axis = shape.axis[at];
            i64 position = number;
            if (at > 0) {
                position = number % axis.extent;
                number /= axis.extent;
            }
            offset += position * axis.stride;
            key *= key_of(axis.first + position);
        }
        rows.offset[nth] = offset;
        rows.key[nth] = key;
    }
}

__device__ __forceinline__ i64 least(i64 a, i64 b) { return a < b ? a : b; }

}  // namespace sums
}  // namespace portakv

extern "C" __global__ void PORTAKV_AT_MOST(PORTAKV_SUM_THREADS)
portakv_sums(PORTAKV_CONSTANT const portakv::sums::Sums sums) {
    using namespace portakv::sums;
    __shared__ Rows rows;
    __shared__ u64 totals[THREADS];
    const u64 entry = sums.tiles[blockIdx.x];
    Part& part = sums.parts[entry >> 32];
    const Shape& shape = sums.shapes[part.shape];
    const i64 number = (i64)(entry & 0xFFFFFFFFull);
    const i64 row = number / shape.across * shape.tile_rows;
    const i64 column = number % shape.across * shape.tile_columns;
    Tile tile;
    tile.at = part.at + column * shape.step;
    tile.step = shape.step;
    tile.first = shape.first + column * (shape.vector == 16 ? 4 : 1);
    tile.rows = (unsigned)least(shape.tile_rows, shape.rows - row);
    tile.columns = (unsigned)least(shape.tile_columns, shape.columns - column);
    tile.lanes = (unsigned)shape.lanes;
    prepare(shape, row, tile.rows, rows);
    __syncthreads();

    u64 total;
    if (shape.vector == 16) total = sum_of<Four>(shape, tile, rows);
    else if (shape.vector == 4) total = sum_of<Single<int>>(shape, tile, rows);
    else if (shape.vector == 2) total = sum_of<Single<short>>(shape, tile, rows);
    else total = sum_of<Single<signed char>>(shape, tile, rows);
    totals[threadIdx.x] = total;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) atomicAdd(&part.sum, totals[0] * shape.factor);
}
