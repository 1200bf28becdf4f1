// SPDX-License-Identifier: Apache-2.0
// The copy of cuda/rows.cuh by a few thread blocks that stay until all is moved: for memory of the
// host or of a peer, which a kernel reaches over a link. The link is busy long before the device is,
// so that more blocks would only take room from other kernels.
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
__device__ __forceinline__ i64 id_of(const Request& request, const int* carried, unsigned unit) {
    if constexpr (!Shape::ids) {
        (void)request, (void)carried, (void)unit;
        return 0;
    } else {
        const i64 at = request.first + unit;
        return id_at(request, carried, Shape::per_id == 1 ? at : at / Shape::per_id);
    }
}

// `number_of` for an id that was read: to it the index holds nothing else.
template <class Shape>
__device__ __forceinline__ bool number_by(
    i64 id, const Request& request, unsigned unit, unsigned& number, bool& bad) {
    if constexpr (!Shape::ids) {
        (void)id;
        return number_of<Shape>(request, 0, unit, number, bad);
    } else {
        Request known = request;
        known.ids = &id;
        known.wide = 1;
        known.first = (request.first + unit) % Shape::per_id;
        return number_of<Shape>(known, 0, 0, number, bad);
    }
}

// A place in every plane: what its unit, its piece and its vector give of the address.
struct Place { i64 entry, bytes; };

template <class Shape, class Inner>
__device__ __forceinline__ Place place_of(
    const Side& side, unsigned number, unsigned piece, i64 byte) {
    Place place = {0, byte};
    i64 none = 0;
    place.bytes += WalkOf<typename Shape::bounded>::type::steps(
        number, side.units, Shape::kind == UNITS ? place.entry : none);
    place.bytes += WalkOf<Inner>::type::bytes(piece, side.inner);
    return place;
}

template <class Shape, class Outer>
__device__ __forceinline__ char* address_in(
    const Request& request, const Side& side, const i64* table, unsigned plane, Place place) {
    i64 entry = place.entry;
    i64 base = request.base + WalkOf<Outer>::type::bounded(plane, side.outer, entry);
    if constexpr (Shape::kind == PLANES) base += table[entry];
    if constexpr (Shape::kind == UNITS) base += request.table[entry];
    return (char*)base + place.bytes;
}

// Strips and Planes: a thread has Strips * Planes vectors in flight at once, for each strip the same
// place in so many planes, which is worked out once. A strip is as wide as a block.
//
// With one plane at a time a block passes from each plane to the next, however short. With several,
// all threads of a block have the same planes, so that a warp works these out once; the last block of
// each group of planes may have less to do.
template <int Bytes, unsigned Run, unsigned Strips, unsigned Planes, class Inner, class Outer,
          class Src, class Dst>
__device__ __forceinline__ void copy_direct(const CarryingOf<Src, Dst>& copy) {
    constexpr unsigned row = Inner::product * Run;  // vectors of one unit in one plane
    constexpr unsigned groups = (Outer::product + Planes - 1) / Planes;
    typedef typename Vector<Bytes>::type V;
    const unsigned each_plane = copy.units * row, width = blockDim.x * Strips;
    const unsigned length = Planes == 1 ? each_plane : (each_plane + width - 1) / width * width;
    const unsigned all = length * groups;
    const Divisor lengths(length);
    for (unsigned start = blockIdx.x * width; start < all; start += gridDim.x * width) {
        unsigned group[Strips], in[Strips], unit[Strips];
        i64 from_id[Strips], to_id[Strips];
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Strips; ++nth) {
            const unsigned at = start + nth * blockDim.x + threadIdx.x;
            const unsigned there = at < all ? at : all - 1;
            group[nth] = groups == 1 ? 0 : lengths.divide(Planes == 1 ? there : start);
            const unsigned here = there - group[nth] * length;
            const unsigned known = here < each_plane ? here : each_plane - 1;  // anything readable
            unit[nth] = copy.start + known / row;
            in[nth] = at < all && here == known ? here % row : row;
            from_id[nth] = id_of<Src>(copy.from, copy.carried, unit[nth]);
            to_id[nth] = id_of<Dst>(copy.to, copy.carried, unit[nth]);
        }
        V vectors[Strips][Planes];
        Place into[Strips];
        bool moved[Strips];
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Strips; ++nth) {
            unsigned from, to;
            bool bad = false;
            const bool read = number_by<Src>(from_id[nth], copy.from, unit[nth], from, bad);
            const bool write = number_by<Dst>(to_id[nth], copy.to, unit[nth], to, bad);
            if (bad && in[nth] == 0 && group[nth] == 0 && copy.status)
                report(copy.status, (i64)unit[nth] * copy.unit + 1);
            moved[nth] = !bad && read && write && in[nth] != row;
            if (!moved[nth]) continue;
            const unsigned piece = in[nth] / Run;
            const i64 byte = (i64)(in[nth] % Run) * Bytes;
            const Place place = place_of<Src, Inner>(copy.src, from, piece, byte);
            into[nth] = place_of<Dst, Inner>(copy.dst, to, piece, byte);
            PORTAKV_UNROLL
            for (unsigned more = 0; more < Planes; ++more) {
                const unsigned plane = group[nth] * Planes + more;
                if (Outer::product % Planes != 0 && plane >= Outer::product) continue;
                vectors[nth][more] = fetch<V>(
                    address_in<Src, Outer>(copy.from, copy.src, copy.src_table, plane, place));
            }
        }
        // All loads are in flight before the first store waits for its own.
        PORTAKV_UNROLL
        for (unsigned nth = 0; nth < Strips; ++nth) {
            if (!moved[nth]) continue;
            PORTAKV_UNROLL
            for (unsigned more = 0; more < Planes; ++more) {
                const unsigned plane = group[nth] * Planes + more;
                if (Outer::product % Planes != 0 && plane >= Outer::product) continue;
                put<V>(
                    address_in<Dst, Outer>(copy.to, copy.dst, copy.dst_table, plane, into[nth]),
                    vectors[nth][more]);
            }
        }
    }
}

}  // namespace portakv
