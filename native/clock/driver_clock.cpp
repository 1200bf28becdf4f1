// SPDX-License-Identifier: Apache-2.0
// Tell how long functions of a driver take the host, for `portakv bench --wall`.
//
// A measured function is called through one of a fixed number of slots, whose addresses the core
// gets in place of the driver's. All of them take whole numbers and addresses, at most eleven, and
// return a number. A slot passes on eleven words: by the calling conventions of x86-64 and AArch64
// a function does not look at words after its own.

#include <chrono>
#include <cstdint>

namespace {

using Word = uint64_t;
using Function = int (*)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);

constexpr int kSlots = 16;

Function functions[kSlots];
int taken = 0;
bool running = false;
int64_t nanoseconds = 0;
int64_t calls = 0;

int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

template <int slot>
int timed(Word a, Word b, Word c, Word d, Word e, Word f, Word g, Word h, Word i, Word j, Word k) {
  const Function function = functions[slot];
  if (!running) return function(a, b, c, d, e, f, g, h, i, j, k);
  const int64_t began = now();
  const int result = function(a, b, c, d, e, f, g, h, i, j, k);
  nanoseconds += now() - began;
  calls++;
  return result;
}

template <int slot = 0>
Function slot_at(int number) {
  if constexpr (slot == kSlots) {
    return nullptr;
  } else {
    return number == slot ? timed<slot> : slot_at<slot + 1>(number);
  }
}

}  // namespace

extern "C" {

// Return the address that calls a function and times it; null: no slot is free.
void *driver_clock_wrap(void *function) {
  if (taken == kSlots) return nullptr;
  functions[taken] = reinterpret_cast<Function>(function);
  return reinterpret_cast<void *>(slot_at(taken++));
}

// Begin at zero.
void driver_clock_start() {
  nanoseconds = 0;
  calls = 0;
  running = true;
}

// End, and write the time and the number of the calls.
void driver_clock_stop(int64_t *nanoseconds_out, int64_t *calls_out) {
  running = false;
  *nanoseconds_out = nanoseconds;
  *calls_out = calls;
}

}  // extern "C"
