// SPDX-License-Identifier: Apache-2.0
// Moves bytes between open files and memory, by threads of the core. Linux alone.
//
// A batch of requests has one of two ways. The ring's thread hands requests to io_uring and takes
// their ends. Movers, a few threads more, make plain calls: for an engine without a ring, and for
// requests that a ring could not carry out whole. They also verify long reads of both.
#ifndef PORTAKV_IO_H
#define PORTAKV_IO_H

#if defined(__linux__)

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core.h"

namespace portakv {

// What the bytes of a read have to be: pieces of memory and their checksums.
struct IoCheck {
  const unsigned char *base;
  const int64_t *pieces;  // an offset from the base and a length for each
  int64_t count;
  uint64_t seed;
  const uint64_t *expected;
};

struct IoRequest {
  int fd;
  int64_t offset;
  unsigned char *address;
  int64_t nbytes;
  bool write;
  IoCheck check;  // its count is 0: none
};

// The requests of one call, and their ends.
class IoBatch {
 public:
  IoBatch(std::vector<IoRequest> requests, bool each);

  // Note the end of a request, which is reported once.
  void end(size_t number, int64_t result);

  // Write new ends, and return their number: once all requests have ended, or at each end if the
  // caller wants it so. Wait up to `milliseconds`, without a limit if negative. Return 0 after that
  // time or after a signal.
  int64_t wait(int64_t *ends, int64_t room, int64_t milliseconds);

  const std::vector<IoRequest> requests;
  std::atomic<bool> cancelled{false};
  // Of the ring's thread: requests that it put, or ended without doing so, and those in flight.
  size_t begun = 0;
  size_t in_flight = 0;

 private:
  bool is_ready() const;

  std::mutex mutex_;
  std::vector<std::pair<size_t, int64_t>> ends_;  // not reported
  size_t ended_ = 0;
  const bool each_;
  std::atomic<uint32_t> changes_{0};  // what `wait` waits for
};

class IoRing;

// An engine. Its threads own it together with the caller.
class IoEngine : public std::enable_shared_from_this<IoEngine> {
 public:
  IoEngine(bool ring, int64_t depth, std::vector<std::pair<int64_t, int64_t>> memory,
           const portakv_io_system &system);

  // Start the ring's thread, if the engine has one. Return 0 or a negative errno.
  int64_t start();
  void begin(const std::shared_ptr<IoBatch> &batch);
  void cancel(const std::shared_ptr<IoBatch> &batch);
  void close();
  void close_inherited();
  portakv_io_state state();

 private:
  enum class Step { kMove, kMoveAgain, kVerify };
  struct Work {
    std::shared_ptr<IoBatch> batch;
    size_t number;
    Step step;
  };

  void run_ring();
  bool open_ring();
  void serve_ring(IoRing &ring);
  void put_requests(IoRing &ring);
  void note_ends(IoRing &ring);
  void fail_ring(IoRing &ring, int64_t code);
  void drain(IoRing &ring);

  void push(Work work);
  void run_mover();
  bool start_mover();
  void carry_out(const Work &work);
  int64_t move(const IoRequest &request) const;

  const bool has_ring_;
  const size_t depth_;
  const std::vector<std::pair<int64_t, int64_t>> memory_;
  const portakv_io_system system_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;  // a ring's thread began or ended
  std::condition_variable work_;
  bool closed_ = false;
  bool ring_answered_ = false;
  bool ring_thread_ = false;
  bool ring_sleeps_ = false;
  std::deque<std::shared_ptr<IoBatch>> batches_;  // with requests that the ring was not given
  std::deque<Work> todo_;
  size_t movers_ = 0;
  size_t idle_ = 0;
  portakv_io_state state_ = {};

  std::unique_ptr<IoRing> ring_;  // of the ring's thread
  std::atomic<size_t> flying_{0};
  int wake_ = -1;
};

}  // namespace portakv

#endif

#endif
