// SPDX-License-Identifier: Apache-2.0
// The copy of cuda/rows.cuh by a few thread blocks that stay until all is moved: for memory of the
// host, which a kernel reaches over the link. The link is busy long before the device is, so that
// more blocks would only take room from other kernels.
//
// Takes the same argument. It does not lie beside that file: what lies there counts as source of
// the backends `cuda` and `hip`.

#include "../cuda/rows.cuh"

// A launch of so many threads must be possible, however many vectors each keeps in registers.
#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIPCC_RTC__)
#define PORTAKV_AT_MOST(threads) __launch_bounds__(threads)
#else
#define PORTAKV_AT_MOST(threads)
#endif

namespace portakv {

template <class V> __device__ __forceinline__ V fetch(const char* from) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(from));  // see copy_rows; mapped memory of the host is global too
#endif
    return *(const PORTAKV_GLOBAL V*)from;
}

template <class V> __device__ __forceinline__ void put(char* to, V vector) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(to));
#endif
    *(PORTAKV_GLOBAL V*)to = vector;
}

// Divides numbers below 2^30 by one that is known only when the kernel runs, without a division
// each time. The factor is 2^shift / divisor, rounded up, with the shift so large that the error
// stays below one for each of these numbers, and no larger, so that the factor fits 32 bits.
struct Divisor {
    unsigned factor, shift;
    __device__ __forceinline__ explicit Divisor(unsigned divisor) : shift(30) {
        while (shift < 60 && (1ull << (shift - 30)) < divisor) ++shift;
        factor = (unsigned)(((1ull << shift) + divisor - 1) / divisor);
    }
    __device__ __forceinline__ unsigned divide(unsigned number) const {
        return (unsigned)((u64)number * factor >> shift);
    }
};

// The id of a unit as the index has it. Read ahead of `number_of`, which decides by it: so all ids
// of a thread are on their way before the first is waited for.
template <class Shape>
__device__ __forceinline__ i64 id_of(const Request& request, unsigned unit) {
    if constexpr (!Shape::ids) {
        (void)request, (void)unit;
        return 0;
    } else {
        const i64 at = request.first + unit;
        const i64 slot = Shape::per_id == 1 ? at : at / Shape::per_id;
        return request.wide ? ((const i64*)request.ids)[slot] : ((const int*)request.ids)[slot];
    }
}

// `number_of` for an id that was read: to it the index holds nothing else.
template <class Shape>
__device__ __forceinline__ bool number_by(
    i64 id, const Request& request, unsigned unit, unsigned& number, bool& bad) {
    if constexpr (!Shape::ids) {
        (void)id;
        return number_of<Shape>(request, unit, number, bad);
    } else {
        Request known = request;
        known.ids = &id;
        known.wide = 1;
        known.first = (request.first + unit) % Shape::per_id;
        return number_of<Shape>(known, 0, number, bad);
    }
}

// Strip: neighbouring threads that take neighbouring vectors; it divides a block.
// Each: strips in a row, of which a thread has its vectors in flight at once.
template <int Bytes, unsigned Run, unsigned Strip, unsigned Each, class Inner, class Outer,
          class Src, class Dst>
__device__ __forceinline__ void copy_direct(const CopyOf<Src, Dst>& copy) {
    constexpr unsigned row = Inner::product * Run;  // vectors of one unit in one plane
    typedef typename Vector<Bytes>::type V;
    const unsigned each_plane = copy.units * row;
    const unsigned all = each_plane * Outer::product;
    const Divisor planes(each_plane);
    const unsigned turn = gridDim.x * blockDim.x * Each;
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned first = thread / Strip * (Strip * Each) + thread % Strip;
    for (unsigned start = 0; start < all; start += turn) {
        unsigned plane[Each], in[Each], unit[Each];
        i64 from_id[Each], to_id[Each];
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Each; ++nth) {
            const unsigned at = start + first + nth * Strip;
            const unsigned there = at < all ? at : all - 1;  // past the end: anything readable
            plane[nth] = Outer::product == 1 ? 0 : planes.divide(there);
            const unsigned here = there - plane[nth] * each_plane;
            unit[nth] = copy.start + here / row;
            in[nth] = at < all ? here % row : row;
            from_id[nth] = id_of<Src>(copy.from, unit[nth]);
            to_id[nth] = id_of<Dst>(copy.to, unit[nth]);
        }
        V vectors[Each];
        char* targets[Each];
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Each; ++nth) {
            targets[nth] = 0;
            unsigned from, to;
            bool bad = false;
            const bool read = number_by<Src>(from_id[nth], copy.from, unit[nth], from, bad);
            const bool write = number_by<Dst>(to_id[nth], copy.to, unit[nth], to, bad);
            if (bad && in[nth] == 0 && plane[nth] == 0 && copy.status)
                *copy.status = (i64)unit[nth] * copy.unit + 1;
            if (bad || !read || !write || in[nth] == row) continue;
            const unsigned piece = in[nth] / Run;
            const i64 byte = (i64)(in[nth] % Run) * Bytes;
            const char* src = address_of<Src, Outer, Inner>(
                copy.from, copy.src, copy.src_table, from, plane[nth], piece);
            char* dst = address_of<Dst, Outer, Inner>(
                copy.to, copy.dst, copy.dst_table, to, plane[nth], piece);
            targets[nth] = dst + byte;
            vectors[nth] = fetch<V>(src + byte);
        }
        // All loads are in flight before the first store waits for its own.
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Each; ++nth)
            if (targets[nth]) put<V>(targets[nth], vectors[nth]);
    }
}

}  // namespace portakv
