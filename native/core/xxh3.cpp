// SPDX-License-Identifier: Apache-2.0
#include "xxh3.h"

#include <dlfcn.h>

#include <cstring>

#include "core.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PORTAKV_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace portakv {
namespace {

constexpr uint64_t kPrime32[] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr uint64_t kPrime64[] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5};
constexpr uint64_t kMix = 0x9FB21C651E98DF25;      // of inputs of 4 to 8 bytes
constexpr uint64_t kScramble = 0x165667919E3779F9;  // of the last step

constexpr size_t kSecretBytes = 192;
constexpr size_t kStripe = 64;
constexpr size_t kStripes = (kSecretBytes - kStripe) / 8;  // of a block
constexpr size_t kBlock = kStripe * kStripes;
constexpr size_t kLastSecret = kSecretBytes - kStripe;
constexpr size_t kLanes = 8;

alignas(64) constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

using Bytes = const unsigned char *;

// The specification reads numbers with the lowest byte first, which is the order of the host
// (self_test.cpp).
uint64_t read64(Bytes at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

uint64_t read32(Bytes at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

uint64_t secret64(size_t at) { return read64(kSecret + at); }

uint64_t rotate_left(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

// Multiply to 128 bits, and return the lower half XOR the upper half.
uint64_t multiply_fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t hash) {
  hash ^= hash >> 37;
  hash *= kScramble;
  return hash ^ hash >> 32;
}

// The last step of XXH64, which the shortest inputs take.
uint64_t avalanche_xxh64(uint64_t hash) {
  hash ^= hash >> 33;
  hash *= kPrime64[1];
  hash ^= hash >> 29;
  hash *= kPrime64[2];
  return hash ^ hash >> 32;
}

// --- Short inputs -----------------------------------------------------------------------------

uint64_t hash_1_to_3(Bytes data, size_t nbytes, uint64_t seed) {
  const uint64_t first = data[0];
  const uint64_t middle = data[nbytes >> 1];
  const uint64_t last = data[nbytes - 1];
  const uint64_t combined = first << 16 | middle << 24 | last | nbytes << 8;
  const uint64_t flip = (read32(kSecret) ^ read32(kSecret + 4)) + seed;
  return avalanche_xxh64(combined ^ flip);
}

uint64_t hash_4_to_8(Bytes data, size_t nbytes, uint64_t seed) {
  seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
  const uint64_t combined = read32(data + nbytes - 4) + (read32(data) << 32);
  uint64_t hash = combined ^ ((secret64(8) ^ secret64(16)) - seed);
  hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
  hash *= kMix;
  hash ^= (hash >> 35) + nbytes;
  hash *= kMix;
  return hash ^ hash >> 28;
}

uint64_t hash_9_to_16(Bytes data, size_t nbytes, uint64_t seed) {
  const uint64_t low = read64(data) ^ ((secret64(24) ^ secret64(32)) + seed);
  const uint64_t high = read64(data + nbytes - 8) ^ ((secret64(40) ^ secret64(48)) - seed);
  return avalanche(nbytes + __builtin_bswap64(low) + high + multiply_fold(low, high));
}

// Mix 16 bytes of the input with 16 bytes of the secret.
uint64_t mix16(Bytes data, size_t secret_at, uint64_t seed) {
  const uint64_t low = read64(data) ^ (secret64(secret_at) + seed);
  const uint64_t high = read64(data + 8) ^ (secret64(secret_at + 8) - seed);
  return multiply_fold(low, high);
}

uint64_t hash_17_to_128(Bytes data, size_t nbytes, uint64_t seed) {
  uint64_t hash = nbytes * kPrime64[0];
  // Pairs of 16 bytes from both ends towards the middle.
  const size_t pairs = (nbytes - 1) / 32 + 1;
  for (size_t i = 0; i < pairs; ++i) {
    hash += mix16(data + 16 * i, 32 * i, seed);
    hash += mix16(data + nbytes - 16 * (i + 1), 32 * i + 16, seed);
  }
  return avalanche(hash);
}

uint64_t hash_129_to_240(Bytes data, size_t nbytes, uint64_t seed) {
  uint64_t hash = nbytes * kPrime64[0];
  for (size_t i = 0; i < 8; ++i) hash += mix16(data + 16 * i, 16 * i, seed);
  hash = avalanche(hash);
  for (size_t i = 8; i < nbytes / 16; ++i) hash += mix16(data + 16 * i, 16 * (i - 8) + 3, seed);
  hash += mix16(data + nbytes - 16, 136 - 17, seed);
  return avalanche(hash);
}

// --- Long inputs ------------------------------------------------------------------------------
//
// Eight lanes of 64 bits accumulate stripes of 64 bytes; each stripe uses the secret 8 bytes further
// on. After each block of 16 stripes the lanes are scrambled.

struct Lanes {
  alignas(64) uint64_t lane[kLanes];
};

// Accumulate all blocks that end before the last byte, then the whole stripes before that byte, then
// the last 64 bytes. The versions for processors differ in speed alone.
using Accumulate = void (*)(Lanes &lanes, Bytes data, size_t nbytes, Bytes secret);

size_t whole_blocks(size_t nbytes) { return (nbytes - 1) / kBlock; }

// Return the stripes of a block, the last of which may be cut short.
size_t stripes_of(size_t block, size_t nbytes) {
  const size_t left = nbytes - 1 - block * kBlock;
  return left < kBlock ? left / kStripe : kStripes;
}

void add_stripe(Lanes &lanes, Bytes data, Bytes secret) {
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t value = read64(data + 8 * i);
    const uint64_t keyed = value ^ read64(secret + 8 * i);
    lanes.lane[i ^ 1] += value;
    lanes.lane[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

void scramble(Lanes &lanes, Bytes secret) {
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t lane = lanes.lane[i];
    lanes.lane[i] = (lane ^ lane >> 47 ^ read64(secret + 8 * i)) * kPrime32[0];
  }
}

void accumulate_plain(Lanes &lanes, Bytes data, size_t nbytes, Bytes secret) {
  const size_t blocks = whole_blocks(nbytes);
  for (size_t block = 0; block <= blocks; ++block) {
    const size_t stripes = stripes_of(block, nbytes);
    for (size_t i = 0; i < stripes; ++i) {
      add_stripe(lanes, data + block * kBlock + i * kStripe, secret + 8 * i);
    }
    if (block < blocks) scramble(lanes, secret + kLastSecret);
  }
  add_stripe(lanes, data + nbytes - kStripe, secret + kLastSecret - 7);
}

#if defined(PORTAKV_X86)

// Bytes that the processor loads ahead: a page, which is faster than less from memory.
constexpr size_t kAhead = 4096;

#define PORTAKV_AVX2 __attribute__((target("avx2")))

PORTAKV_AVX2 inline __m256i load(Bytes at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
}

// Add half of a stripe to four lanes.
PORTAKV_AVX2 inline __m256i added(__m256i lanes, Bytes data, Bytes secret) {
  const __m256i value = load(data);
  const __m256i keyed = _mm256_xor_si256(value, load(secret));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(_mm256_add_epi64(lanes, swapped), product);
}

// Scramble four lanes. The prime has 32 bits, so each half of a lane is multiplied alone.
PORTAKV_AVX2 inline __m256i scrambled(__m256i lanes, Bytes secret) {
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32[0]));
  const __m256i mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47));
  const __m256i keyed = _mm256_xor_si256(mixed, load(secret));
  const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(upper, 32));
}

PORTAKV_AVX2 void accumulate_avx2(Lanes &lanes, Bytes data, size_t nbytes, Bytes secret) {
  auto *const all = reinterpret_cast<__m256i *>(lanes.lane);
  __m256i low = _mm256_load_si256(all);
  __m256i high = _mm256_load_si256(all + 1);
  const size_t blocks = whole_blocks(nbytes);
  for (size_t block = 0; block <= blocks; ++block) {
    const size_t stripes = stripes_of(block, nbytes);
    for (size_t i = 0; i < stripes; ++i) {
      const Bytes stripe = data + block * kBlock + i * kStripe;
      __builtin_prefetch(stripe + kAhead);
      low = added(low, stripe, secret + 8 * i);
      high = added(high, stripe + 32, secret + 8 * i + 32);
    }
    if (block < blocks) {
      low = scrambled(low, secret + kLastSecret);
      high = scrambled(high, secret + kLastSecret + 32);
    }
  }
  const Bytes last = data + nbytes - kStripe;
  low = added(low, last, secret + kLastSecret - 7);
  high = added(high, last + 32, secret + kLastSecret - 7 + 32);
  _mm256_store_si256(all, low);
  _mm256_store_si256(all + 1, high);
}

// Return which registers the system saves for a process (XCR0); 0: it does not say.
uint64_t saved_registers() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return 0;
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

Accumulate choose_accumulate() {
  constexpr uint64_t kYmm = 0x6;  // the registers of SSE and AVX
  constexpr unsigned kAvx2 = 1u << 5;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0;
  const bool saved = (saved_registers() & kYmm) == kYmm;
  return known && (b & kAvx2) && saved ? accumulate_avx2 : accumulate_plain;
}

#else

Accumulate choose_accumulate() { return accumulate_plain; }

#endif

const Accumulate kAccumulate = choose_accumulate();

uint64_t hash_long(Bytes data, size_t nbytes, uint64_t seed, Accumulate accumulate) {
  alignas(64) unsigned char secret[kSecretBytes];
  for (size_t at = 0; at < kSecretBytes; at += 16) {
    const uint64_t words[] = {secret64(at) + seed, secret64(at + 8) - seed};
    std::memcpy(secret + at, words, sizeof words);
  }

  Lanes lanes = {{kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2], kPrime64[3], kPrime32[1],
                  kPrime64[4], kPrime32[0]}};
  accumulate(lanes, data, nbytes, secret);

  uint64_t hash = nbytes * kPrime64[0];
  for (size_t i = 0; i < kLanes; i += 2) {
    const Bytes key = secret + 11 + 8 * i;
    hash += multiply_fold(lanes.lane[i] ^ read64(key), lanes.lane[i + 1] ^ read64(key + 8));
  }
  return avalanche(hash);
}

uint64_t hash(Bytes data, size_t nbytes, uint64_t seed, Accumulate accumulate) {
  if (nbytes > 240) return hash_long(data, nbytes, seed, accumulate);
  if (nbytes > 128) return hash_129_to_240(data, nbytes, seed);
  if (nbytes > 16) return hash_17_to_128(data, nbytes, seed);
  if (nbytes > 8) return hash_9_to_16(data, nbytes, seed);
  if (nbytes > 3) return hash_4_to_8(data, nbytes, seed);
  if (nbytes > 0) return hash_1_to_3(data, nbytes, seed);
  return avalanche_xxh64(seed ^ secret64(56) ^ secret64(64));
}

// --- Buffers of Python ------------------------------------------------------------------------

// Py_buffer, which is the same in every Python since 3.0.
struct Buffer {
  void *data;
  void *object;
  ptrdiff_t nbytes;
  ptrdiff_t item_bytes;
  int read_only;
  int dimensions;
  char *format;
  ptrdiff_t *shape;
  ptrdiff_t *strides;
  ptrdiff_t *suboffsets;
  void *internal;
};

// Functions of the interpreter that loaded this library.
struct Buffers {
  int (*get)(void *object, Buffer *out, int flags);
  void (*release)(Buffer *buffer);
  void *(*leave)();
  void (*enter)(void *state);
};

template <class Function>
void find(Function &function, const char *name) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

Buffers find_buffers() {
  Buffers found;
  find(found.get, "PyObject_GetBuffer");
  find(found.release, "PyBuffer_Release");
  find(found.leave, "PyEval_SaveThread");
  find(found.enter, "PyEval_RestoreThread");
  return found;
}

// A plain, contiguous buffer: PyBUF_SIMPLE.
constexpr int kSimple = 0;

// Bytes whose checksum takes longer than a change of the interpreter's thread.
constexpr ptrdiff_t kLong = 64 << 10;

}  // namespace

uint64_t xxh3(const void *data, size_t nbytes, uint64_t seed) {
  return hash(static_cast<Bytes>(data), nbytes, seed, kAccumulate);
}

}  // namespace portakv

uint64_t portakv_xxh3(const void *data, int64_t nbytes, uint64_t seed) {
  return portakv::xxh3(data, static_cast<size_t>(nbytes), seed);
}

uint64_t portakv_xxh3_buffer(void *object, uint64_t seed) {
  static const portakv::Buffers buffers = portakv::find_buffers();
  portakv::Buffer buffer;
  if (!buffers.get || buffers.get(object, &buffer, portakv::kSimple)) return 0;
  void *const state = buffer.nbytes > portakv::kLong ? buffers.leave() : nullptr;
  const uint64_t hash = portakv::xxh3(buffer.data, static_cast<size_t>(buffer.nbytes), seed);
  if (state) buffers.enter(state);
  buffers.release(&buffer);
  return hash;
}

void portakv_xxh3_pieces(const void *base, const int64_t *pieces, int64_t count, uint64_t seed,
                         uint64_t *out) {
  const auto *bytes = static_cast<const unsigned char *>(base);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = portakv::xxh3(bytes + pieces[2 * i], static_cast<size_t>(pieces[2 * i + 1]), seed);
  }
}

uint64_t portakv_xxh3_plain(const void *data, int64_t nbytes, uint64_t seed) {
  return portakv::hash(static_cast<const unsigned char *>(data), static_cast<size_t>(nbytes), seed,
                       portakv::accumulate_plain);
}
