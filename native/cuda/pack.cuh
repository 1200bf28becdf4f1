// SPDX-License-Identifier: Apache-2.0
// The encoding `pack`: copy planes of bf16 values into slots, and slots into planes.
//
// A plane holds the values of one block, layer, half and head, token after token. Its slot holds,
// in this order: sign and mantissa of each value (a byte), a code for each exponent (`Bits` bits),
// a head with the table of the codes, and a byte for each exponent that the table lacks (an
// escape). portakv/layout/packing.py has the format byte by byte.
//
// A segment is 2,048 values, and a warp takes one segment: 8 vectors of 8 values for each thread.
// Planes of one segment need no barrier between warps, so that a thread block takes several planes.
// A larger plane is one thread block. Unpacking has no barrier: the head has the number of escapes
// before each segment.
//
// The address of a raw value is found as `rows.cuh` finds it. A warp has 32 threads. On AMD's devices
// it is a wave of 32, or one half of a wave of 64, whose other half may have taken another branch.

#include "rows.cuh"

#if defined(__CUDACC__)
#define PORTAKV_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#elif defined(__HIPCC__) || defined(__HIPCC_RTC__)  // HIP's second number: the least waves of a SIMD
#define PORTAKV_BOUNDS(threads, blocks) __launch_bounds__(threads)
#else
#define PORTAKV_BOUNDS(threads, blocks)
#endif

namespace portakv {
namespace pack {

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr u32 SEGMENT = 2048;     // values of a warp
constexpr u32 EACH = 8;           // values of a vector of 16 bytes
constexpr u32 ROUNDS = SEGMENT / EACH / 32;

// The parts of a slot, in bytes.
template <int Bits, u32 Values, u32 Slot> struct Format {
    static constexpr int bits = Bits;
    static constexpr u32 values = Values;
    static constexpr u32 slot = Slot;
    static constexpr u32 vectors = Values / EACH;
    static constexpr u32 warps = (Values + SEGMENT - 1) / SEGMENT;
    static constexpr bool sampled = Values >= 8192;  // one value of a vector counts, else all
    static constexpr u32 escape = (1u << Bits) - 1;  // the code of an escape; entries of the table
    static constexpr u32 codes_at = Values;
    static constexpr u32 head_at = codes_at + Values * Bits / 8;
    static constexpr u32 head = Values >= 8192 ? 64 : 32;
    static constexpr u32 escapes_at = head_at + head;
    static constexpr u32 cap = Slot - escapes_at;
    static_assert(Bits == 3 || Bits == 4, "codes of 3 or 4 bits");
    static_assert(Values % 64 == 0 && Values >= 256, "whole vectors, and whole words of codes");
    static_assert(Slot % 32 == 0 && Slot >= escapes_at, "a slot holds all but the escapes");
    static_assert(18 + 2 * (warps - 1) <= head, "the head has a count for each segment but one");
    static_assert(warps <= 32, "a lane sums up the escapes before a segment");
};

// Where the values of a plane lie. Run: vectors without a gap. Inner: loops inside a plane, in the
// order of the values.
template <class Shape, u32 Run, class Inner> struct Raw {
    typedef Shape shape;
    typedef Inner inner;
    static constexpr u32 run = Run;
};

// `Copy` with a word for each unit: 1 if a plane of it did not fit into its slot (packing), or if a
// slot says so (unpacking). The launch clears the words before.
template <class Src, class Dst> struct PackOf {
    CopyOf<Src, Dst> copy;
    u32* overflow;
};

// --- instructions ---------------------------------------------------------------------------------

// Bytes of two words, chosen by the nibbles of `which`: byte_perm without its mask.
__device__ __forceinline__ u32 choose(u32 a, u32 b, u32 which) {
#if defined(__CUDA_ARCH__)
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(which));
    return result;
#else
    const u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int at = 0; at < 4; ++at) {
        const u32 nibble = which >> 4 * at & 15;
        const u8 byte = (u8)(both >> 8 * (nibble & 7));
        result |= (u32)(nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * at;
    }
    return result;
#endif
}

__device__ __forceinline__ u32 merge(u32 mask, u32 ones, u32 zeros) {
    return (ones & mask) | (zeros & ~mask);
}

// Hide from the compiler where a value comes from: it computes what follows from it once more,
// instead of keeping the results of all rounds in registers.
__device__ __forceinline__ void forget(u32& value) {
#if defined(__CUDA_ARCH__)
    asm("" : "+r"(value));
#else
    (void)value;
#endif
}

// What the lanes of a warp exchange. All of them call each of these functions at the same place.
#if defined(__AMDGCN__)
__device__ __forceinline__ void sync_warp() {
    // A wave goes in step; the compiler must not keep what other lanes read or write.
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}
__device__ __forceinline__ u32 ballot(bool bit) {
    return (u32)(__ballot(bit) >> (__lane_id() & 32));
}
__device__ __forceinline__ bool any_of(bool bit) { return ballot(bit) != 0; }
__device__ __forceinline__ u32 of_lane(u32 value, u32 lane) { return __shfl(value, lane, 32); }
__device__ __forceinline__ u32 of_lane_below(u32 value, u32 by) {
    return __shfl_up(value, by, 32);
}
__device__ __forceinline__ u32 sum_of(u32 value) {
    for (u32 step = 16; step; step /= 2) value += __shfl_xor(value, step, 32);
    return value;
}
__device__ __forceinline__ u32 max_of(u32 value) {
    for (u32 step = 16; step; step /= 2) {
        const u32 other = __shfl_xor(value, step, 32);
        value = other > value ? other : value;
    }
    return value;
}
#else
constexpr u32 ALL = 0xffffffffu;
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ u32 ballot(bool bit) { return __ballot_sync(ALL, bit); }
__device__ __forceinline__ bool any_of(bool bit) { return __any_sync(ALL, bit); }
__device__ __forceinline__ u32 of_lane(u32 value, u32 lane) {
    return __shfl_sync(ALL, value, lane);
}
__device__ __forceinline__ u32 of_lane_below(u32 value, u32 by) {
    return __shfl_up_sync(ALL, value, by);
}
__device__ __forceinline__ u32 sum_of(u32 value) { return __reduce_add_sync(ALL, value); }
__device__ __forceinline__ u32 max_of(u32 value) { return __reduce_max_sync(ALL, value); }
#endif

// Sum over the lanes below, in each field of a word: no field may overflow into the next.
__device__ __forceinline__ u32 sum_to(u32 value, u32 lane) {
    PORTAKV_UNROLL
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 below = of_lane_below(value, step);
        if (lane >= step) value += below;
    }
    return value;
}

template <class V> __device__ __forceinline__ V load(const char* from) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(from));
#endif
    return *(const PORTAKV_GLOBAL V*)from;
}

template <class V> __device__ __forceinline__ void store(char* to, V value) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(to));
#endif
    *(PORTAKV_GLOBAL V*)to = value;
}

// --- values ---------------------------------------------------------------------------------------

// Four values of bf16 in two words -> four bytes of sign and mantissa, and four exponents.
__device__ __forceinline__ void split(u32 x, u32 y, u32& rest, u32& exponents) {
    const u32 low = choose(x, y, 0x6420);
    const u32 high = choose(x, y, 0x7531);
    rest = merge(0x80808080u, high, low);
    exponents = merge(0x01010101u, low >> 7, high << 1);
}

__device__ __forceinline__ void join(u32 rest, u32 exponents, u32& x, u32& y) {
    const u32 high = merge(0x80808080u, rest, exponents >> 1);
    const u32 low = merge(0x80808080u, exponents << 7, rest);
    x = choose(low, high, 0x5140);
    y = choose(low, high, 0x7362);
}

// Four bytes of a table of 16, by the nibbles of the low half of a word.
__device__ __forceinline__ u32 look_up(const Wide& table, u32 nibbles) {
    const u32 which = nibbles & 0x7777u;
    const u32 upper = nibbles & 0x8888u;
    const u32 low = choose(table[0], table[1], which);
    const u32 high = choose(table[2], table[3], which);
    // 255 where bit 3 of a nibble is set: nibble 9 repeats the sign of byte 1.
    return merge(choose(0x00008000u, 0, upper | upper >> 3), high, low);
}

// Four codes in the nibbles of the low half -> four exponents.
template <int Bits> __device__ __forceinline__ u32 exponents_of(const Wide& table, u32 codes) {
    if constexpr (Bits == 3) return choose(table[0], table[1], codes & 0xffffu);
    else return look_up(table, codes);
}

// One bit in each nibble whose code is an escape.
template <int Bits> __device__ __forceinline__ u32 escapes_in(u32 codes) {
    u32 all = codes & codes >> 1 & codes >> 2;
    if constexpr (Bits == 4) all &= codes >> 3;
    return all & 0x11111111u;
}

// Eight codes of three bits: from nibbles to 24 bits, and back.
__device__ __forceinline__ u32 narrow(u32 codes) {
    codes = (codes & 0x07070707u) | (codes & 0x70707070u) >> 1;
    codes = (codes & 0x003f003fu) | (codes & 0x3f003f00u) >> 2;
    return (codes & 0xfffu) | codes >> 16 << 12;
}

__device__ __forceinline__ u32 widen(u32 bits) {
    bits = (bits & 0xfffu) | (bits & 0xfff000u) << 4;
    bits = (bits & 0x003f003fu) | (bits & 0x0fc00fc0u) << 2;
    return (bits & 0x07070707u) | (bits & 0x38383838u) << 1;
}

// --- addresses ------------------------------------------------------------------------------------

// A plane of the copy: its unit, and its number among the planes of a unit.
struct Plane { u32 unit, number; };

// The address of vector `at` of a plane, from that of its first vector.
template <class F, class R>
__device__ __forceinline__ char* raw_vector(char* first, const Side& side, u32 at) {
    typedef typename R::inner Inner;
    static_assert(Inner::product * R::run == F::vectors, "loops and run make a plane");
    return first + WalkOf<Inner>::type::bytes(at / R::run, side.inner) + (i64)(at % R::run) * 16;
}

// Both addresses of a plane; false if it is not moved. A bad id is reported once.
template <class Outer, class SrcInner, class DstInner, class Src, class Dst>
__device__ __forceinline__ bool plane_addresses(
    const CopyOf<Src, Dst>& copy, Plane plane, bool reports, char*& src, char*& dst) {
    u32 from, to;
    bool bad = false;
    const bool read = number_of<Src>(copy.from, 0, plane.unit, from, bad);
    const bool write = number_of<Dst>(copy.to, 0, plane.unit, to, bad);
    if (bad && reports && plane.number == 0 && copy.status)
        report(copy.status, (i64)plane.unit * copy.unit + 1);
    if (bad || !read || !write) return false;
    src = address_of<Src, Outer, SrcInner>(
        copy.from, copy.src, copy.src_table, from, plane.number, 0);
    dst = address_of<Dst, Outer, DstInner>(copy.to, copy.dst, copy.dst_table, to, plane.number, 0);
    return true;
}

// --- packing --------------------------------------------------------------------------------------

// What the threads of a plane share.
template <class F> struct Shared {
    alignas(16) u32 counts[256];
    alignas(16) u32 ranked[32];  // count << 8 | exponent
    alignas(16) u8 codes[256];   // of each exponent
    alignas(16) u8 table[16];
    u32 escapes[F::warps];
};

template <class F> __device__ __forceinline__ void sync_plane() {
    if constexpr (F::warps == 1) sync_warp();
    else __syncthreads();
}

// Set codes and table from the counts, by one warp: the most frequent exponents, and of equal ones
// the larger first.
template <class F> __device__ __forceinline__ void make_table(Shared<F>& shared, u32 lane) {
    if (lane < 16) shared.table[lane] = 0;
    u32 keys[8];
    u32 found = 0;
    PORTAKV_UNROLL
    for (u32 nth = 0; nth < 8; ++nth) {
        const u32 exponent = nth * 32 + lane;
        const u32 count = shared.counts[exponent];
        keys[nth] = count ? count << 8 | exponent : 0;
        const u32 present = ballot(count != 0);
        const u32 place = found + __popc(present & ((1u << lane) - 1));
        if (count && place < 32) shared.ranked[place] = keys[nth];
        found += __popc(present);
    }
    sync_warp();
    if (found <= 32) {
        // A key for each lane: its code is the number of greater keys.
        const u32 key = lane < found ? shared.ranked[lane] : 0;
        u32 rank = 0;
        for (u32 other = 0; other < found; ++other) rank += shared.ranked[other] > key;
        if (key && rank < F::escape) {
            shared.codes[key & 255] = (u8)rank;
            shared.table[rank] = (u8)key;
        }
        return;
    }
    for (u32 rank = 0; rank < F::escape; ++rank) {
        u32 best = 0;
        PORTAKV_UNROLL
        for (u32 nth = 0; nth < 8; ++nth) best = keys[nth] > best ? keys[nth] : best;
        best = max_of(best);
        PORTAKV_UNROLL
        for (u32 nth = 0; nth < 8; ++nth) {
            if (keys[nth] != best) continue;
            keys[nth] = 0;
            shared.codes[best & 255] = (u8)rank;
            shared.table[rank] = (u8)best;
        }
    }
}

// Add the exponents of a thread to the counts of its plane.
template <class F>
__device__ __forceinline__ void count_all(
    Shared<F>& shared, const u32 (&exponents)[ROUNDS][2], u32 first) {
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        if (F::values % SEGMENT && first + round * 32 >= F::vectors) continue;
        // Not by the shift that finds codes later: the compiler would keep all 64 results.
        PORTAKV_UNROLL
        for (u32 at = 0; at < EACH; ++at)
            atomicAdd(&shared.counts[choose(exponents[round][at / 4], 0, 0x4440 | at % 4)], 1u);
    }
}

template <class F>
__device__ __forceinline__ void count_sample(
    Shared<F>& shared, const u32 (&exponents)[ROUNDS][2], u32 first) {
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 at = first + round * 32;
        if (F::values % SEGMENT && at >= F::vectors) continue;
        const u32 which = (at + at / 16) & 7;
        atomicAdd(&shared.counts[choose(exponents[round][0], exponents[round][1], which) & 255], 1u);
    }
}

template <class F> __device__ __forceinline__ void clear_counts(Shared<F>& shared, u32 thread) {
    for (u32 at = thread; at < 256; at += F::warps * 32) shared.counts[at] = 0;
    for (u32 at = thread; at < 64; at += F::warps * 32)
        ((u32*)shared.codes)[at] = F::escape * 0x01010101u;
}

// Find the codes of a thread's values.
template <class F>
__device__ __forceinline__ void find_codes(
    Shared<F>& shared, const u32 (&exponents)[ROUNDS][2], u32 (&codes)[ROUNDS], u32 first,
    u32 warp, u32 lane) {
    clear_counts<F>(shared, warp * 32 + lane);
    sync_plane<F>();
    if constexpr (F::sampled) count_sample<F>(shared, exponents, first);
    else count_all<F>(shared, exponents, first);
    sync_plane<F>();
    if (warp == 0) make_table<F>(shared, lane);
    sync_plane<F>();
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        codes[round] = 0;
        if (F::values % SEGMENT && first + round * 32 >= F::vectors) continue;
        PORTAKV_UNROLL
        for (u32 nth = 0; nth < EACH; ++nth) {
            const u32 exponent = exponents[round][nth / 4] >> 8 * (nth % 4) & 255;
            codes[round] |= (u32)shared.codes[exponent] << 4 * nth;
        }
    }
}

// Store the codes of one round of a warp, 8 for each thread in nibbles. All lanes call it.
template <class F>
__device__ __forceinline__ void store_codes(char* slot, u32 codes, u32 at, u32 lane) {
    char* const to = slot + F::codes_at;
    if constexpr (F::bits == 4) {
        if (F::values % SEGMENT == 0 || at < F::vectors) store<u32>(to + at * 4, codes);
    } else {
        // 24 bits of each lane become 24 words: word w begins in the bits of lane 4 w / 3.
        const u32 bits = narrow(codes);
        const u32 from = lane * 4 / 3;
        const u32 low = of_lane(bits, from & 31);
        const u32 high = of_lane(bits, (from + 1) & 31);
        const u32 skipped = lane * 4 % 3 * 8;
        const u32 word = low >> skipped | high << (24 - skipped);
        const u32 byte = (at - lane) * 3 + lane * 4;
        if (lane < 24 && (F::values % SEGMENT == 0 || byte < F::vectors * 3))
            store<u32>(to + byte, word);
    }
}

// The places of a thread's escapes among those of its plane.
struct Ranks {
    u32 fields[3];  // three rounds in each: below 1,024, since a round of a warp has 256 values
    u32 totals[3];  // of all lanes
    u32 before;     // escapes of the plane before the round

    // All lanes call it. `start`: escapes of the plane before this warp.
    template <int Bits>
    __device__ __forceinline__ void find(const u32 (&codes)[ROUNDS], u32 start, u32 lane) {
        before = start;
        PORTAKV_UNROLL
        for (u32 word = 0; word < 3; ++word) {
            u32 own = 0;
            PORTAKV_UNROLL
            for (u32 nth = 0; nth < 3; ++nth)
                if (word * 3 + nth < ROUNDS)
                    own |= __popc(escapes_in<Bits>(codes[word * 3 + nth])) << 10 * nth;
            fields[word] = sum_to(own, lane);
            totals[word] = of_lane(fields[word], 31);
        }
    }
    static __device__ __forceinline__ u32 field(u32 word, u32 round) {
        return word >> 10 * (round % 3) & 1023;
    }
    // True if a lane has an escape in a round.
    __device__ __forceinline__ bool any(u32 round) const {
        return field(totals[round / 3], round) != 0;
    }
    // The rank of the first escape of this thread in a round that has any; in the order of rounds.
    __device__ __forceinline__ u32 next(u32 round, u32 mask) {
        const u32 rank = before + field(fields[round / 3], round) - __popc(mask);
        before += field(totals[round / 3], round);
        return rank;
    }
};

// Clear the part of a slot that a thread wrote, and all of its share of the rest.
template <class F> __device__ __forceinline__ void clear_slot(char* slot, u32 thread) {
    constexpr u32 threads = F::warps * 32;
    Pair none;
    none[0] = none[1] = 0;
    for (u32 at = thread * 8; at < F::slot; at += threads * 8) store<Pair>(slot + at, none);
}

template <class F>
__device__ __forceinline__ void store_head(
    char* slot, const Shared<F>& shared, u32 total, u32 running, u32 lane) {
    if (lane < 4) store<u32>(slot + F::head_at + lane * 4, ((const u32*)shared.table)[lane]);
    const u32 count = lane == 0 ? total : lane < F::warps ? running : 0;
    if (lane < (F::head - 16) / 2) store<u16>(slot + F::head_at + 16 + lane * 2, (u16)count);
}

template <class F, class R, class Slots, class Outer, u32 Planes>
__device__ __forceinline__ void pack_planes(const PackOf<typename R::shape, Slots>& argument) {
    static_assert(F::warps == 1 || Planes == 1, "planes of several warps have a block each");
    __shared__ Shared<F> all[Planes];
    const CopyOf<typename R::shape, Slots>& copy = argument.copy;
    const u32 lane = threadIdx.x % 32;
    const u32 warp = threadIdx.x / 32 % F::warps;
    Shared<F>& shared = all[threadIdx.x / 32 / F::warps];
    const u32 item = blockIdx.x * Planes + threadIdx.x / 32 / F::warps;
    if (item >= copy.units * Outer::product) return;

    const Plane plane = {copy.start + item / Outer::product, item % Outer::product};
    char *source, *slot;
    if (!plane_addresses<Outer, typename R::inner, Extents<>>(
            copy, plane, warp == 0 && lane == 0, source, slot))
        return;

    // All vectors are in flight before the first is used.
    const u32 first = warp * (SEGMENT / EACH) + lane;
    Wide vectors[ROUNDS];
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 at = first + round * 32;
        if (F::values % SEGMENT && at >= F::vectors) {
            for (u32 part = 0; part < 4; ++part) vectors[round][part] = 0;
            continue;
        }
        vectors[round] = load<Wide>(raw_vector<F, R>(source, copy.src, at));
    }

    // Bytes of sign and mantissa go out immediately; exponents stay in registers.
    u32 exponents[ROUNDS][2];
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 at = first + round * 32;
        const Wide vector = vectors[round];
        u32 low, high;
        split(vector[0], vector[1], low, exponents[round][0]);
        split(vector[2], vector[3], high, exponents[round][1]);
        Pair rest;
        rest[0] = low;
        rest[1] = high;
        if (F::values % SEGMENT == 0 || at < F::vectors) store<Pair>(slot + at * 8, rest);
    }
    u32 codes[ROUNDS];
    find_codes<F>(shared, exponents, codes, first, warp, lane);

    u32 found = 0;
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        store_codes<F>(slot, codes[round], first + round * 32, lane);
        found += __popc(escapes_in<F::bits>(codes[round]));
    }
    found = sum_of(found);

    // Escapes before this segment, before segment `lane`, and in all.
    u32 start = 0, running = 0, total = found;
    if constexpr (F::warps > 1) {
        if (lane == 0) shared.escapes[warp] = found;
        __syncthreads();
        total = 0;
        PORTAKV_UNROLL
        for (u32 nth = 0; nth < F::warps; ++nth) {
            if (nth == warp) start = total;
            if (nth == lane) running = total;
            total += shared.escapes[nth];
        }
    }
    if (total > F::cap) {
        // Other warps may have stored codes where this thread clears: all have, by now.
        sync_plane<F>();
        clear_slot<F>(slot, warp * 32 + lane);
        sync_plane<F>();
        if (warp == 0 && lane == 0) {
            store<u8>(slot + F::head_at + 15, 1);
            if (argument.overflow) argument.overflow[plane.unit] = 1;
        }
        return;
    }
    if (found) {
        Ranks ranks;
        ranks.find<F::bits>(codes, start, lane);
        PORTAKV_UNROLL
        for (u32 round = 0; round < ROUNDS; ++round) {
            if (!ranks.any(round)) continue;
            forget(codes[round]);
            u32 mask = escapes_in<F::bits>(codes[round]);
            u32 rank = ranks.next(round, mask);
            for (; mask; mask &= mask - 1) {
                const u32 nth = (__ffs(mask) - 1) / 4;
                const u32 exponent = choose(exponents[round][0], exponents[round][1], nth) & 255;
                store<u8>(slot + F::escapes_at + rank++, (u8)exponent);
            }
        }
    }
    for (u32 at = total + warp * 32 + lane; at < F::cap; at += F::warps * 32)
        store<u8>(slot + F::escapes_at + at, 0);
    if (warp == 0) store_head<F>(slot, shared, total, running, lane);
}

// --- unpacking ------------------------------------------------------------------------------------

// The codes of vector `at`, in nibbles (4 bits) or in 24 bits.
template <class F> __device__ __forceinline__ u32 load_codes(const char* slot, u32 at) {
    const char* const from = slot + F::codes_at;
    if constexpr (F::bits == 4) {
        return load<u32>(from + at * 4);
    } else {
        // Two words that hold the 3 bytes, often one twice.
        const u32 byte = at * 3;
        const u32 low = load<u32>(from + byte / 4 * 4);
        const u32 high = load<u32>(from + (byte + 2) / 4 * 4);
        return (u32)(((u64)high << 32 | low) >> byte % 4 * 8) & 0xffffffu;
    }
}

template <class F> __device__ __forceinline__ Wide load_table(const char* slot) {
    if constexpr (F::head_at % 16 == 0) {
        return load<Wide>(slot + F::head_at);
    } else {
        const Pair low = load<Pair>(slot + F::head_at);
        const Pair high = load<Pair>(slot + F::head_at + 8);
        Wide table;
        table[0] = low[0];
        table[1] = low[1];
        table[2] = high[0];
        table[3] = high[1];
        return table;
    }
}

// Put the escapes of a round into its exponents.
template <class F>
__device__ __forceinline__ void take_escapes(
    const char* slot, u32 mask, Ranks& ranks, u32 round, u32 (&exponents)[2]) {
    u32 rank = ranks.next(round, mask);
    for (; mask; mask &= mask - 1) {
        const u32 bit = __ffs(mask) - 1;
        // A damaged slot has more escapes than it holds: never read past its end.
        const u32 place = rank < F::cap ? rank : F::cap - 1;
        ++rank;
        const u32 bytes = load<u8>(slot + F::escapes_at + place) * 0x01010101u;
        // No index that the compiler does not know: that would cost the registers.
        const u32 byte = 255u << (bit * 2 & 31);
        exponents[0] = merge(bit < 16 ? byte : 0, bytes, exponents[0]);
        exponents[1] = merge(bit < 16 ? 0 : byte, bytes, exponents[1]);
    }
}

template <class F, class R, class Slots, class Outer, u32 Planes>
__device__ __forceinline__ void unpack_planes(const PackOf<Slots, typename R::shape>& argument) {
    const CopyOf<Slots, typename R::shape>& copy = argument.copy;
    const u32 lane = threadIdx.x % 32;
    const u32 warp = threadIdx.x / 32 % F::warps;
    const u32 item = blockIdx.x * Planes + threadIdx.x / 32 / F::warps;
    if (item >= copy.units * Outer::product) return;

    const Plane plane = {copy.start + item / Outer::product, item % Outer::product};
    char *slot, *target;
    if (!plane_addresses<Outer, Extents<>, typename R::inner>(
            copy, plane, warp == 0 && lane == 0, slot, target))
        return;

    // Everything but escapes is in flight before the first value is used.
    const u32 first = warp * (SEGMENT / EACH) + lane;
    u32 codes[ROUNDS];
    Pair rests[ROUNDS];
    Wide table = load_table<F>(slot);
    u32 start = 0;
    if constexpr (F::warps > 1)
        if (warp) start = load<u16>(slot + F::head_at + 16 + 2 * warp);
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 at = first + round * 32;
        codes[round] = rests[round][0] = rests[round][1] = 0;
        if (F::values % SEGMENT && at >= F::vectors) continue;
        codes[round] = load_codes<F>(slot, at);
        rests[round] = load<Pair>(slot + at * 8);
    }
    if (table[3] >> 24) {
        if (warp == 0 && lane == 0 && argument.overflow) argument.overflow[plane.unit] = 1;
        return;
    }
    u32 found = 0;
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        if constexpr (F::bits == 3) codes[round] = widen(codes[round]);
        found |= escapes_in<F::bits>(codes[round]);
    }
    const bool escapes = F::cap && any_of(found != 0);
    Ranks ranks;
    if (escapes) ranks.find<F::bits>(codes, start, lane);
    PORTAKV_UNROLL
    for (u32 round = 0; round < ROUNDS; ++round) {
        forget(codes[round]);
        u32 exponents[2];
        exponents[0] = exponents_of<F::bits>(table, codes[round]);
        exponents[1] = exponents_of<F::bits>(table, codes[round] >> 16);
        if (escapes && ranks.any(round))
            take_escapes<F>(slot, escapes_in<F::bits>(codes[round]), ranks, round, exponents);
        const u32 at = first + round * 32;
        if (F::values % SEGMENT && at >= F::vectors) continue;
        u32 x, y, z, w;
        join(rests[round][0], exponents[0], x, y);
        join(rests[round][1], exponents[1], z, w);
        Wide vector;
        vector[0] = x;
        vector[1] = y;
        vector[2] = z;
        vector[3] = w;
        store<Wide>(raw_vector<F, R>(target, copy.dst, at), vector);
    }
}

}  // namespace pack
}  // namespace portakv
