// SPDX-License-Identifier: Apache-2.0
// The one kernel family of PortaKV: copy rows between two views under an index on either side.
//
// One thread moves one vector, or `Each` of them. blockIdx.x walks through the vectors of a plane in
// copy order, blockIdx.y through the planes. Everything that a model fixes (vector width, run, loop
// extents, index types, how a block is split) is a template parameter, so that division is by
// constants and nothing loops; everything that a request changes (addresses, strides, counts) is an
// argument.
//
// Raw pointers and integers only: this text builds under NVRTC, nvcc, hipRTC and hipcc. No cache
// hints: on an H200 every one of them cost bandwidth (benchmarks/notes/copies.md). The instances that
// a plan needs are written behind it (portakv/backends/rows_kernel.py), and both are compiled as one
// text.

// Arguments stay in constant memory if the compiler has a word for it.
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
#define PORTAKV_CONSTANT __grid_constant__
#else
#define PORTAKV_CONSTANT
#endif

// AMD's compiler keeps a vector type in registers, but takes a structure through LDS, and uses the
// instructions for global memory only if the type of a pointer says that it points there.
#if defined(__AMDGCN__)
#define PORTAKV_GLOBAL __attribute__((address_space(1)))
#else
#define PORTAKV_GLOBAL
#endif

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIPCC_RTC__)
#define PORTAKV_UNROLL _Pragma("unroll")
#else
#define PORTAKV_UNROLL
#endif

namespace portakv {

typedef long long i64;
typedef unsigned long long u64;

// Words that are one access, of 16 bytes and of 8; the other vectors are plain integers.
#if defined(__AMDGCN__)
typedef unsigned int Wide __attribute__((vector_size(16)));
typedef unsigned int Pair __attribute__((vector_size(8)));
#else
template <int Words> struct alignas(4 * Words) WordsOf {
    unsigned int part[Words];
    __device__ __forceinline__ unsigned int& operator[](int at) { return part[at]; }
    __device__ __forceinline__ unsigned int operator[](int at) const { return part[at]; }
};
typedef WordsOf<4> Wide;
typedef WordsOf<2> Pair;
#endif
template <int Bytes> struct Vector;
template <> struct Vector<16> { typedef Wide type; };
template <> struct Vector<8> { typedef u64 type; };
template <> struct Vector<4> { typedef unsigned int type; };
template <> struct Vector<2> { typedef unsigned short type; };
template <> struct Vector<1> { typedef unsigned char type; };

// One step of a loop: entries of the address table, and bytes.
struct Step { i64 table, stride; };

// What a request fixes about one side.
struct Request {
    i64 base;           // origin: an address, or bytes behind the table's addresses
    const i64* table;   // addresses, if the shape says UNITS
    const void* ids;    // if the shape says that there are any
    i64 wide;           // ids are int32 (0), int64 (1), or those of `CarryingOf` from `first` on (2)
    i64 first;          // number of the unit at position 0 (of its id, if there are ids)
    i64 limit;          // units in the view: ids past it move nothing
};

// What two forms fix about one side.
struct Side {
    Step units[3];      // how the number of a unit walks, outermost first
    Step outer[4];      // how planes walk
    i64 inner[6];       // bytes of the loops inside a unit
};

struct Copy {
    Request from, to;
    unsigned units;     // units in this launch
    unsigned start;     // the first of them, for launches that were split
    unsigned unit;      // tokens of a unit, to name a bad position
    unsigned ahead;     // vectors to prefetch ahead in copy order; 0: none
    i64* status;
    Side src, dst;
};

template <unsigned... E> struct Extents {
    static constexpr int count = sizeof...(E);
    static constexpr unsigned product = (1u * ... * E);
};

// How a side finds the address of a plane.
enum Table {
    NONE,    // one address, all else is strides
    PLANES,  // an entry for each plane, in the arguments: read from constant memory
    UNITS    // entries in device memory, also chosen by the number of a unit
};

// Ids: there is an index. PerId: units of one id. Entries: of the table, if it is PLANES.
// Bounded: extents of the split number.
template <bool Ids, unsigned PerId, int Kind, unsigned Entries, class Bounded> struct SideShape {
    static constexpr bool ids = Ids;
    static constexpr unsigned per_id = PerId;
    static constexpr int kind = Kind;
    static constexpr unsigned entries = Entries;
    typedef Bounded bounded;
};

// The argument, with the tables that travel in it behind.
template <class Src, class Dst> struct CopyOf : Copy {
    i64 src_table[Src::entries ? Src::entries : 1];
    i64 dst_table[Dst::entries ? Dst::entries : 1];
};

// The argument of a copy of rows: behind the tables there is room for few ids of the host, which a
// kernel would else fetch over the link (14 - 21 us on an H200). It fits the 4 KiB of every driver.
template <class Src, class Dst> struct CarryingOf : CopyOf<Src, Dst> {
    static constexpr unsigned left = (4096 - sizeof(CopyOf<Src, Dst>)) / sizeof(int);
    int carried[!Src::ids && !Dst::ids ? 2 : left < 512 ? left : 512];
};

// Walk a number through loops of constant extents, innermost last.
template <unsigned... E> struct Walk;
template <> struct Walk<> {
    static __device__ __forceinline__ i64 bytes(unsigned, const i64*) { return 0; }
    static __device__ __forceinline__ i64 steps(unsigned at, const Step* step, i64& entry) {
        entry += at * step[0].table;
        return at * step[0].stride;
    }
    static __device__ __forceinline__ i64 bounded(unsigned, const Step*, i64&) { return 0; }
};
template <unsigned First, unsigned... Rest> struct Walk<First, Rest...> {
    static constexpr unsigned below = Extents<Rest...>::product;
    static __device__ __forceinline__ i64 bytes(unsigned at, const i64* stride) {
        return (i64)(at / below) * stride[0] + Walk<Rest...>::bytes(at % below, stride + 1);
    }
    // The unbounded step stands first: step[0] takes what the bounded ones leave.
    static __device__ __forceinline__ i64 steps(unsigned at, const Step* step, i64& entry) {
        constexpr unsigned all = First * below;
        const unsigned outermost = at / all;
        entry += outermost * step[0].table;
        return outermost * step[0].stride + bounded(at % all, step + 1, entry);
    }
    static __device__ __forceinline__ i64 bounded(unsigned at, const Step* step, i64& entry) {
        const unsigned here = at / below;
        entry += here * step[0].table;
        return here * step[0].stride + Walk<Rest...>::bounded(at % below, step + 1, entry);
    }
};
template <class E> struct WalkOf;
template <unsigned... E> struct WalkOf<Extents<E...>> { typedef Walk<E...> type; };

// The id at a place of the list.
__device__ __forceinline__ i64 id_at(const Request& request, const int* carried, i64 place) {
    if (request.wide == 2) return carried[place];
    return request.wide ? ((const i64*)request.ids)[place] : ((const int*)request.ids)[place];
}

// The number of a unit on one side: false if it is skipped or past the end (then `bad`).
template <class Shape>
__device__ __forceinline__ bool number_of(
    const Request& request, const int* carried, unsigned unit, unsigned& number, bool& bad) {
    if constexpr (!Shape::ids) {
        number = (unsigned)(request.first + unit);
        return true;
    } else {
        const i64 at = request.first + unit;
        const i64 id = id_at(request, carried, Shape::per_id == 1 ? at : at / Shape::per_id);
        if (id < 0) return false;
        // Compared before it is multiplied: no id, however large, can overflow.
        if (id >= request.limit / Shape::per_id + 1) { bad = true; return false; }
        const i64 found = Shape::per_id == 1 ? id : id * Shape::per_id + at % Shape::per_id;
        if (found >= request.limit) { bad = true; return false; }
        number = (unsigned)found;
        return true;
    }
}

template <class Shape, class Outer, class Inner>
__device__ __forceinline__ char* address_of(
    const Request& request, const Side& side, const i64* table, unsigned number, unsigned plane,
    unsigned piece) {
    i64 entry = 0, none = 0;
    i64 bytes = WalkOf<typename Shape::bounded>::type::steps(
        number, side.units, Shape::kind == UNITS ? entry : none);
    bytes += WalkOf<Outer>::type::bounded(plane, side.outer, entry);
    bytes += WalkOf<Inner>::type::bytes(piece, side.inner);
    i64 base = request.base;
    if constexpr (Shape::kind == PLANES) base += table[entry];
    if constexpr (Shape::kind == UNITS) base += request.table[entry];
    // Not one sum: only of a pointer and an offset is the compiler told that it is global memory.
    return (char*)base + bytes;
}

// Leave the lowest bad position + 1 in the status word, which holds 0 at first. Threads and launches
// arrive in any order, so a thread replaces only 0 and higher positions.
__device__ __forceinline__ void report(i64* status, i64 position) {
    typedef unsigned long long Word;
    Word found = (Word)*(volatile i64*)status;
    while (found == 0 || found > (Word)position) {
        const Word before = atomicCAS((Word*)status, found, (Word)position);
        if (before == found) break;
        found = before;
    }
}

// Both addresses of a piece of a unit; false if it is not moved. A bad id is reported once.
template <class Outer, class Inner, class Src, class Dst>
__device__ __forceinline__ bool both_addresses(
    const CarryingOf<Src, Dst>& copy, unsigned unit, unsigned plane, unsigned piece, bool reports,
    char*& src, char*& dst) {
    unsigned from, to;
    bool bad = false;
    const bool read = number_of<Src>(copy.from, copy.carried, unit, from, bad);
    const bool write = number_of<Dst>(copy.to, copy.carried, unit, to, bad);
    if (bad && reports && plane == 0 && copy.status) report(copy.status, (i64)unit * copy.unit + 1);
    if (bad || !read || !write) return false;
    src = address_of<Src, Outer, Inner>(copy.from, copy.src, copy.src_table, from, plane, piece);
    dst = address_of<Dst, Outer, Inner>(copy.to, copy.dst, copy.dst_table, to, plane, piece);
    return true;
}

__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    (void)address;
#endif
}

// Fetch what is copied `ahead` vectors later: past the end of a plane lies the next one.
template <int Bytes, unsigned Run, class Inner, class Outer, class Src, class Dst>
__device__ __forceinline__ void fetch_ahead(
    const CarryingOf<Src, Dst>& copy, unsigned at, unsigned plane, unsigned all) {
    constexpr unsigned row = Inner::product * Run;
    // A lane for each 128-byte line.
    if (!copy.ahead || at * Bytes % 128 >= Bytes) return;
    unsigned later = at + copy.ahead, next = plane, number;
    if (later >= all) { later -= all; next += 1; }
    bool bad = false;
    if (later >= all || next >= gridDim.y
        || !number_of<Src>(copy.from, copy.carried, copy.start + later / row, number, bad))
        return;
    const unsigned in = later % row;
    prefetch(
        address_of<Src, Outer, Inner>(copy.from, copy.src, copy.src_table, number, next, in / Run)
        + (i64)(in % Run) * Bytes);
}

// A unit in one plane has `Lanes` places for its vectors. If there are more places than vectors, each
// vector takes the place that it has in a sector of the destination (32 B), so that no two warps
// write parts of one sector of a row. Memory reads such a sector before it writes it: a scatter of
// rows of 656 B reached 0.80 of a plain copy, and 0.84 with one more lane
// (benchmarks/notes/copies.md).
template <
    int Bytes, unsigned Run, unsigned Lanes, unsigned Each, class Inner, class Outer, class Src,
    class Dst>
__device__ __forceinline__ void copy_rows(const CarryingOf<Src, Dst>& copy) {
    constexpr unsigned row = Inner::product * Run;  // vectors of one unit in one plane
    typedef typename Vector<Bytes>::type V;
    const unsigned plane = blockIdx.y;
    const unsigned all = copy.units * Lanes;
    V vectors[Each];
    char* targets[Each];
    PORTAKV_UNROLL
    for (unsigned nth = 0; nth < Each; ++nth) {
        targets[nth] = 0;
        const unsigned at = (blockIdx.x * Each + nth) * blockDim.x + threadIdx.x;
        if (at >= all) continue;
        const unsigned unit = at / Lanes;
        unsigned in = at % Lanes;
        if (in < row) {
            const unsigned nth_vector = Lanes > row ? unit * row + in : at;
            const unsigned vectors_of_plane = Lanes > row ? copy.units * row : all;
            fetch_ahead<Bytes, Run, Inner, Outer>(copy, nth_vector, plane, vectors_of_plane);
        }
        char *src, *dst;
        if (!both_addresses<Outer, Inner>(
                copy, copy.start + unit, plane, in / Run, in == 0, src, dst))
            continue;
        if constexpr (Lanes > row) {  // only of units that are one run
            in -= (unsigned)((u64)dst % 32) / Bytes;
            // True before the first vector, too, where the number wrapped around.
            if (in >= row) continue;
        }
        const i64 byte = (i64)(in % Run) * Bytes;
#if defined(__CUDA_ARCH__)
        // Addresses come from integers; told that they are global, the compiler takes the direct
        // path.
        __builtin_assume(__isGlobal(src));
#endif
        targets[nth] = dst + byte;
        vectors[nth] = *(const PORTAKV_GLOBAL V*)(src + byte);
    }
    // All loads are in flight before the first store waits for its own.
    PORTAKV_UNROLL
    for (unsigned nth = 0; nth < Each; ++nth) {
        if (!targets[nth]) continue;
#if defined(__CUDA_ARCH__)
        __builtin_assume(__isGlobal(targets[nth]));
#endif
        *(PORTAKV_GLOBAL V*)targets[nth] = vectors[nth];
    }
}

}  // namespace portakv
