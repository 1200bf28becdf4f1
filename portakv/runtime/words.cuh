// SPDX-License-Identifier: Apache-2.0
// Words of tensors and the keys of their positions, for kernels that add up words times keys
// (word_sums.py defines the keys).
//
// Raw pointers and integers only: this text builds under NVRTC, nvcc, hipRTC and hipcc.

// Arguments stay in constant memory if the compiler has a word for it.
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
#define PORTAKV_CONSTANT __grid_constant__
#else
#define PORTAKV_CONSTANT
#endif

// AMD's compiler uses the instructions for global memory only if a pointer's type names it.
#if defined(__AMDGCN__)
#define PORTAKV_GLOBAL __attribute__((address_space(1)))
#else
#define PORTAKV_GLOBAL
#endif

// Threads of a block. NVIDIA's compiler also learns that 1,024 threads of a multiprocessor are
// enough: with these registers it starts all loads of a batch before the first use of one.
#if defined(__CUDACC__)
#define PORTAKV_AT_MOST(threads) __launch_bounds__(threads, 1024 / (threads))
#elif defined(__HIPCC__) || defined(__HIPCC_RTC__)
#define PORTAKV_AT_MOST(threads) __launch_bounds__(threads)
#else
#define PORTAKV_AT_MOST(threads)
#endif

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIPCC_RTC__)
#define PORTAKV_UNROLL _Pragma("unroll")
#else
#define PORTAKV_UNROLL
#endif

namespace portakv {
namespace sums {

typedef long long i64;
typedef unsigned long long u64;

// Return the odd number of a position: the multiplier and the mixes of splitmix64, with shifts that
// keep the sign.
__device__ __forceinline__ u64 key_of(i64 position) {
    u64 x = (u64)position * 0x9E3779B97F4A7C15ull;
    x = (x ^ (u64)((i64)x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (u64)((i64)x >> 27)) * 0x94D049BB133111EBull;
    return x | 1;
}

// 16 bytes as one access.
#if defined(__AMDGCN__)
typedef unsigned int Wide __attribute__((vector_size(16)));
__device__ __forceinline__ unsigned part_of(const Wide& wide, int nth) { return wide[nth]; }
#else
struct alignas(16) Wide { unsigned int part[4]; };
__device__ __forceinline__ unsigned part_of(const Wide& wide, int nth) { return wide.part[nth]; }
#endif

// Vectors of words, of which each is extended with its sign. Words narrower than four bytes belong
// to rows of an odd length, which 16 bytes rarely divide. A batch is the loads of a thread that are
// in flight together.
template <class Word> struct Single {
    typedef Word type;
    static constexpr int words = 1;
    static constexpr unsigned batch = 8;
    static __device__ __forceinline__ u64 word(type vector, int) { return (u64)(i64)vector; }
};
struct Four {
    typedef Wide type;
    static constexpr int words = 4;
    static constexpr unsigned batch = 4;
    static __device__ __forceinline__ u64 word(const type& vector, int nth) {
        return (u64)(i64)(int)part_of(vector, nth);
    }
};

template <class V> __device__ __forceinline__ typename V::type load(const char* at) {
#if defined(__CUDA_ARCH__)
    // Addresses come from a table; told that they are global, the compiler takes the direct path.
    __builtin_assume(__isGlobal(at));
#endif
    return *(const PORTAKV_GLOBAL typename V::type*)at;
}

}  // namespace sums
}  // namespace portakv
