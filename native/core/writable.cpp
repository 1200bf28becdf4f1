// SPDX-License-Identifier: Apache-2.0
// Ask the kernel whether host memory may be written.
#include "writable.h"

#include "core.h"

#if defined(__linux__)
#include <cerrno>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace portakv {
namespace {

constexpr int64_t kPage = 4096;  // bytes of the smallest page, which has one protection

#if defined(__linux__) && defined(SYS_futex)
// Return false if a write of a byte would fail: FUTEX_WAKE_OP joins 0 to its word, atomically.
bool writable_byte(int64_t address) {
  // Waiters at this word are woken, of which there are none. Errors other than this one, such as
  // those of a filter of system calls, say nothing about the memory.
  static uint32_t own = 0;
  const int64_t word = address & ~int64_t{3};
  constexpr int join = FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0);
  const int before = errno;
  const bool failed = syscall(SYS_futex, &own, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, nullptr,
                              reinterpret_cast<uint32_t *>(word), join) == -1;
  const bool fault = failed && errno == EFAULT;
  errno = before;
  return !fault;
}
#else
bool writable_byte(int64_t) { return true; }
#endif

}  // namespace

bool writable(int64_t first, int64_t past) {
  if (past <= first) return true;
  if (!writable_byte(first)) return false;
  return first / kPage == (past - 1) / kPage || writable_byte(past - 1);
}

}  // namespace portakv

int portakv_writable(int64_t first, int64_t past) { return portakv::writable(first, past); }
