// SPDX-License-Identifier: Apache-2.0
#include "io.h"

#include <cerrno>

#if defined(__linux__)

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <thread>

#include "guarded.h"
#include "xxh3.h"

namespace portakv {
namespace {

// More movers only wait for the same disk.
constexpr size_t kMostMovers = 8;
// Bytes of a request that another thread verifies, or that io_uring has carried out by one if the
// file has the page cache: less is done where it is.
constexpr int64_t kLong = 64 << 10;
// The most bytes of a registered buffer and of one request of a ring.
constexpr int64_t kLargest = int64_t{1} << 30;

// --- The system -------------------------------------------------------------------------------

// The same on every architecture but alpha.
constexpr long kSetup = 425;
constexpr long kEnter = 426;
constexpr long kRegister = 427;

int64_t result_of(long code) { return code < 0 ? -errno : code; }

int64_t call_setup(uint32_t entries, void *params) {
  return result_of(syscall(kSetup, entries, params));
}

int64_t call_enter(int fd, uint32_t put, uint32_t least, uint32_t flags) {
  return result_of(syscall(kEnter, fd, put, least, flags, nullptr, size_t{0}));
}

int64_t call_register(int fd, uint32_t operation, const void *argument, uint32_t count) {
  return result_of(syscall(kRegister, fd, operation, argument, count));
}

int64_t call_move(int fd, void *address, int64_t nbytes, int64_t offset, int write) {
  const auto size = static_cast<size_t>(nbytes);
  return result_of(write ? pwrite(fd, address, size, offset) : pread(fd, address, size, offset));
}

int64_t call_admit() { return 0; }

constexpr portakv_io_system kSystem = {call_setup, call_enter, call_register, call_move,
                                       call_admit};

void pause_for_a_millisecond() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// Start a thread that gets no signals: those of the process belong to Python's threads. Return 0 or
// a negative errno.
template <class Body>
int64_t start_thread(const char *name, Body body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int64_t code = 0;
  try {
    std::thread thread(body);
    pthread_setname_np(thread.native_handle(), name);
    // No end of the process waits for a request that hangs.
    thread.detach();
  } catch (const std::system_error &error) {
    code = -error.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return code;
}

bool is_right(const IoCheck &check) {
  for (int64_t i = 0; i < check.count; ++i) {
    const unsigned char *const piece = check.base + check.pieces[2 * i];
    const auto nbytes = static_cast<size_t>(check.pieces[2 * i + 1]);
    if (xxh3(piece, nbytes, check.seed) != check.expected[i]) return false;
  }
  return true;
}

}  // namespace

// --- Batches ----------------------------------------------------------------------------------

IoBatch::IoBatch(std::vector<IoRequest> all, bool each)
    : requests(std::move(all)), each_(each) {
  ends_.reserve(requests.size());
}

void IoBatch::end(size_t number, int64_t result) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_.emplace_back(number, result);
    ended_ += 1;
    if (!is_ready()) return;
  }
  changes_.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &changes_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

bool IoBatch::is_ready() const {
  return !ends_.empty() && (each_ || ended_ == requests.size());
}

int64_t IoBatch::wait(int64_t *ends, int64_t room, int64_t milliseconds) {
  const timespec limit = {milliseconds / 1000, milliseconds % 1000 * 1'000'000};
  while (true) {
    const uint32_t seen = changes_.load(std::memory_order_acquire);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (ends_.empty() && ended_ == requests.size()) return PORTAKV_IO_DONE;
      if (is_ready()) {
        const size_t count = std::min(ends_.size(), static_cast<size_t>(room));
        for (size_t i = 0; i < count; ++i) {
          ends[2 * i] = static_cast<int64_t>(ends_[i].first);
          ends[2 * i + 1] = ends_[i].second;
        }
        ends_.erase(ends_.begin(), ends_.begin() + static_cast<ptrdiff_t>(count));
        return static_cast<int64_t>(count);
      }
    }
    const timespec *const until = milliseconds < 0 ? nullptr : &limit;
    const long code = syscall(SYS_futex, &changes_, FUTEX_WAIT_PRIVATE, seen, until, nullptr, 0);
    if (code < 0 && errno != EAGAIN) return 0;  // a signal, or the time is over
  }
}

// --- io_uring ---------------------------------------------------------------------------------

namespace {

struct Params {
  uint32_t sq_entries;
  uint32_t cq_entries;
  uint32_t flags;
  uint32_t sq_thread_cpu;
  uint32_t sq_thread_idle;
  uint32_t features;
  uint32_t wq_fd;
  uint32_t reserved[3];
  struct {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    uint64_t address;
  } sq;
  struct {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
    uint64_t address;
  } cq;
};
static_assert(sizeof(Params) == 120, "the kernel's io_uring_params");

struct Sqe {
  uint8_t opcode;
  uint8_t flags;
  uint16_t priority;
  int32_t fd;
  uint64_t offset;
  uint64_t address;
  uint32_t nbytes;
  uint32_t operation_flags;
  uint64_t key;
  uint16_t buffer;
  uint16_t personality;
  uint32_t reserved[5];
};
static_assert(sizeof(Sqe) == 64, "the kernel's io_uring_sqe");

struct Cqe {
  uint64_t key;
  int32_t result;
  uint32_t flags;
};

// CQSIZE and CLAMP, with SUBMIT_ALL, SINGLE_ISSUER, DEFER_TASKRUN (Linux 6.1) or alone.
constexpr uint32_t kFlags[] = {0x3098, 0x18};
constexpr uint32_t kFeatures = 0x3;  // SINGLE_MMAP, NODROP: Linux 5.5
constexpr uint32_t kGetEvents = 1;
constexpr off_t kSqesAt = 0x10000000;
constexpr uint8_t kRead = 22;  // the next number is WRITE
constexpr uint8_t kReadFixed = 4;
constexpr uint8_t kAsync = 1 << 4;
constexpr uint64_t kWakeKey = ~uint64_t{0};

// A request in flight, at its place in a list. A key is a count of requests and this place.
struct Flight {
  uint64_t key = kWakeKey;  // if the place is free
  std::shared_ptr<IoBatch> batch;
  size_t number = 0;
};

// Memory that is shared with the kernel.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping() {
    if (data_ != MAP_FAILED) munmap(data_, nbytes_);
  }
  Mapping(const Mapping &) = delete;
  Mapping &operator=(const Mapping &) = delete;

  bool map(int fd, size_t nbytes, off_t offset) {
    nbytes_ = nbytes;
    data_ = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (data_ == MAP_FAILED) return false;
    madvise(data_, nbytes, MADV_DONTFORK);  // a child that lives on does not keep the ring
    return true;
  }

  unsigned char *at(size_t offset) const { return static_cast<unsigned char *>(data_) + offset; }

 private:
  void *data_ = MAP_FAILED;
  size_t nbytes_ = 0;
};

}  // namespace

// A ring, for the thread that made it.
class IoRing {
 public:
  explicit IoRing(const portakv_io_system &system) : system_(system) {}
  ~IoRing() {
    if (fd >= 0) ::close(fd);
  }

  // Return 0 or a negative errno.
  int64_t open(uint32_t entries);
  // Register memory; return 0, or the negative errno for which it is not.
  int64_t enroll(const std::vector<std::pair<int64_t, int64_t>> &memory);

  uint32_t free_entries() const { return entries_ - (put_ - load(taken_)); }
  uint32_t outstanding() const { return put_ - seen_; }
  void put(const std::shared_ptr<IoBatch> &batch, size_t number);
  void put_wake(int eventfd);
  // Have the kernel take what was put, and wait for at least so many ends.
  int64_t enter(uint32_t least);
  // Pass each end in order to `known` with its flight, or mark the ring as poisoned.
  template <class Known>
  void each_end(Known &&known);
  // Take back the requests that the kernel has not taken, and return them.
  std::vector<Flight> take_back();
  // Return the flights whose ends the kernel never reported.
  std::vector<Flight> lost();

  int fd = -1;
  bool poisoned = false;  // it reported a request that it did not have
  bool wakes = false;     // it reads the eventfd

 private:
  static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
  static void store(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
  }
  Sqe &next(uint64_t key);
  bool is_buffered(int file);

  const portakv_io_system &system_;
  Mapping words_;
  Mapping sqes_;
  uint32_t entries_ = 0;
  uint32_t ends_ = 0;  // that the completion queue holds
  uint32_t *taken_ = nullptr;
  uint32_t *put_word_ = nullptr;
  uint32_t *seen_word_ = nullptr;
  uint32_t *reported_ = nullptr;
  Cqe *cqes_ = nullptr;
  uint32_t put_ = 0;
  uint32_t seen_ = 0;
  uint64_t puts_ = 0;  // requests ever put
  std::vector<uint64_t> order_;  // the key of each entry of the submission queue
  std::vector<Flight> flights_;
  std::vector<uint32_t> free_;
  std::vector<int64_t> starts_;  // of registered buffers, in order
  std::vector<int64_t> past_;
  int file_ = -1;  // the last one that `is_buffered` looked at
  bool file_buffered_ = false;
  uint64_t woken_ = 0;
};

int64_t IoRing::open(uint32_t entries) {
  Params params;
  int64_t code = -EINVAL;
  for (const uint32_t flags : kFlags) {
    std::memset(&params, 0, sizeof params);
    params.flags = flags;
    params.cq_entries = 4 * entries;
    code = system_.setup(entries, &params);
    if (code != -EINVAL) break;
  }
  if (code < 0) return code;
  fd = static_cast<int>(code);
  if (~params.features & kFeatures) return PORTAKV_IO_OLD;

  entries_ = params.sq_entries;
  ends_ = params.cq_entries;
  const size_t order_bytes = params.sq.array + 4 * size_t{entries_};
  const size_t ends_bytes = params.cq.cqes + sizeof(Cqe) * ends_;
  if (!words_.map(fd, std::max(order_bytes, ends_bytes), 0)) return -errno;
  if (!sqes_.map(fd, sizeof(Sqe) * entries_, kSqesAt)) return -errno;
  const auto word = [this](uint32_t at) { return reinterpret_cast<uint32_t *>(words_.at(at)); };
  taken_ = word(params.sq.head);
  put_word_ = word(params.sq.tail);
  seen_word_ = word(params.cq.head);
  reported_ = word(params.cq.tail);
  cqes_ = reinterpret_cast<Cqe *>(words_.at(params.cq.cqes));
  // The kernel takes the entries in their order.
  for (uint32_t i = 0; i < entries_; ++i) word(params.sq.array)[i] = i;
  order_.assign(entries_, kWakeKey);
  return 0;
}

int64_t IoRing::enroll(const std::vector<std::pair<int64_t, int64_t>> &memory) {
  std::vector<iovec> buffers;
  for (const auto &part : memory) {
    for (int64_t at = 0; at < part.second; at += kLargest) {
      const int64_t nbytes = std::min(kLargest, part.second - at);
      buffers.push_back({reinterpret_cast<void *>(part.first + at), static_cast<size_t>(nbytes)});
    }
  }
  if (buffers.empty()) return 0;
  std::sort(buffers.begin(), buffers.end(),
            [](const iovec &a, const iovec &b) { return a.iov_base < b.iov_base; });
  const int64_t code = system_.enroll(fd, 0, buffers.data(), static_cast<uint32_t>(buffers.size()));
  if (code < 0) return code;
  for (const iovec &buffer : buffers) {
    starts_.push_back(reinterpret_cast<int64_t>(buffer.iov_base));
    past_.push_back(starts_.back() + static_cast<int64_t>(buffer.iov_len));
  }
  return 0;
}

bool IoRing::is_buffered(int file) {
  if (file != file_) {
    file_ = file;
    const int mode = fcntl(file, F_GETFL);
    file_buffered_ = mode >= 0 && !(mode & O_DIRECT);
  }
  return file_buffered_;
}

Sqe &IoRing::next(uint64_t key) {
  const uint32_t entry = put_ % entries_;
  order_[entry] = key;
  Sqe &sqe = reinterpret_cast<Sqe *>(sqes_.at(0))[entry];
  std::memset(&sqe, 0, sizeof sqe);
  sqe.key = key;
  put_ += 1;
  return sqe;
}

void IoRing::put(const std::shared_ptr<IoBatch> &batch, size_t number) {
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(flights_.size()));
    flights_.emplace_back();
  }
  const uint32_t place = free_.back();
  free_.pop_back();
  const uint64_t key = (++puts_ & 0x7FFFFFFF) << 32 | place;
  flights_[place] = {key, batch, number};

  const IoRequest &request = batch->requests[number];
  const auto address = reinterpret_cast<int64_t>(request.address);
  const auto after = std::upper_bound(starts_.begin(), starts_.end(), address);
  const auto buffer = static_cast<size_t>(after - starts_.begin()) - 1;  // wraps: before all
  const bool fixed = after != starts_.begin() && address + request.nbytes <= past_[buffer];
  Sqe &sqe = next(key);
  sqe.opcode = static_cast<uint8_t>((fixed ? kReadFixed : kRead) + (request.write ? 1 : 0));
  // The kernel copies from or to the page cache in its own threads, several requests at a time.
  if (request.nbytes >= kLong && is_buffered(request.fd)) sqe.flags = kAsync;
  sqe.fd = request.fd;
  sqe.offset = static_cast<uint64_t>(request.offset);
  sqe.address = static_cast<uint64_t>(address);
  sqe.nbytes = static_cast<uint32_t>(std::min(request.nbytes, kLargest));
  sqe.buffer = fixed ? static_cast<uint16_t>(buffer) : uint16_t{0};
}

void IoRing::put_wake(int eventfd) {
  Sqe &sqe = next(kWakeKey);
  sqe.opcode = kRead;
  sqe.fd = eventfd;
  sqe.address = reinterpret_cast<uint64_t>(&woken_);
  sqe.nbytes = sizeof woken_;
  wakes = true;
}

int64_t IoRing::enter(uint32_t least) {
  store(put_word_, put_);
  file_ = -1;  // another file may get the descriptor
  return system_.enter(fd, put_ - load(taken_), least, kGetEvents);
}

template <class Known>
void IoRing::each_end(Known &&known) {
  const uint32_t reported = load(reported_);
  for (; seen_ != reported; ++seen_) {
    const Cqe end = cqes_[seen_ % ends_];
    store(seen_word_, seen_ + 1);
    if (end.key == kWakeKey && wakes) {
      wakes = false;
      continue;
    }
    const auto place = static_cast<uint32_t>(end.key);
    if (place >= flights_.size() || flights_[place].key != end.key || end.key == kWakeKey) {
      poisoned = true;
      continue;
    }
    const Flight flight = std::move(flights_[place]);
    flights_[place] = Flight();
    free_.push_back(place);
    known(flight, end.result);
  }
}

std::vector<Flight> IoRing::take_back() {
  std::vector<Flight> back;
  const uint32_t taken = load(taken_);
  for (uint32_t at = taken; at != put_; ++at) {
    const uint64_t key = order_[at % entries_];
    if (key == kWakeKey) {
      wakes = false;
      continue;
    }
    const auto place = static_cast<uint32_t>(key);
    back.push_back(std::move(flights_[place]));
    flights_[place] = Flight();
    free_.push_back(place);
  }
  put_ = taken;
  store(put_word_, put_);
  return back;
}

std::vector<Flight> IoRing::lost() {
  std::vector<Flight> left;
  for (Flight &flight : flights_) {
    if (flight.batch) left.push_back(std::move(flight));
  }
  flights_.clear();
  free_.clear();
  return left;
}

// --- The engine -------------------------------------------------------------------------------

IoEngine::IoEngine(bool ring, int64_t depth, std::vector<std::pair<int64_t, int64_t>> memory,
                   const portakv_io_system &system)
    : has_ring_(ring),
      depth_(static_cast<size_t>(std::max<int64_t>(depth, 1))),
      memory_(std::move(memory)),
      system_(system) {}

int64_t IoEngine::start() {
  if (!has_ring_) return 0;
  wake_ = eventfd(0, EFD_CLOEXEC);
  if (wake_ < 0) return -errno;
  std::unique_lock<std::mutex> lock(mutex_);
  ring_thread_ = true;
  const auto self = shared_from_this();
  int64_t code = system_.admit();
  if (!code) code = start_thread("portakv ring", [self] { self->run_ring(); });
  if (code < 0) {
    ring_thread_ = false;
    ::close(wake_);
    wake_ = -1;
    return code;
  }
  changed_.wait(lock, [this] { return ring_answered_; });
  if (state_.rings) return 0;
  changed_.wait(lock, [this] { return !ring_thread_; });
  return state_.refused;
}

void IoEngine::begin(const std::shared_ptr<IoBatch> &batch) {
  std::unique_lock<std::mutex> lock(mutex_);
  const size_t count = batch->requests.size();
  if (closed_) {
    for (size_t number = 0; number < count; ++number) batch->end(number, -ECANCELED);
    return;
  }
  if (ring_thread_) {
    batches_.push_back(batch);
    changed_.notify_all();
    if (ring_sleeps_) eventfd_write(wake_, 1);
    return;
  }
  for (size_t number = 0; number < count; ++number) {
    todo_.push_back({batch, number, Step::kMove});
    start_mover();
  }
  if (movers_) {
    work_.notify_all();
    return;
  }
  // The system has no thread for the engine: the caller moves the bytes.
  todo_.clear();
  lock.unlock();
  for (size_t number = 0; number < count; ++number) carry_out({batch, number, Step::kMove});
}

void IoEngine::cancel(const std::shared_ptr<IoBatch> &batch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  batch->cancelled = true;
  const auto queued = std::find(batches_.begin(), batches_.end(), batch);
  if (queued != batches_.end()) {
    batches_.erase(queued);
    for (; batch->begun < batch->requests.size(); ++batch->begun) {
      batch->end(batch->begun, -ECANCELED);
    }
  }
  const auto begins_not = [&batch](const Work &work) {
    return work.batch == batch && work.step == Step::kMove;
  };
  for (const Work &work : todo_) {
    if (begins_not(work)) batch->end(work.number, -ECANCELED);
  }
  todo_.erase(std::remove_if(todo_.begin(), todo_.end(), begins_not), todo_.end());
}

void IoEngine::close() {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  for (const auto &batch : batches_) {
    for (; batch->begun < batch->requests.size(); ++batch->begun) {
      batch->end(batch->begun, -ECANCELED);
    }
  }
  batches_.clear();
  const auto begins_not = [](const Work &work) { return work.step == Step::kMove; };
  for (const Work &work : todo_) {
    if (begins_not(work)) work.batch->end(work.number, -ECANCELED);
  }
  todo_.erase(std::remove_if(todo_.begin(), todo_.end(), begins_not), todo_.end());
  work_.notify_all();
  changed_.notify_all();
  if (ring_thread_) eventfd_write(wake_, 1);
  // An idle ring is gone when this returns. One with requests under way goes after them.
  changed_.wait(lock, [this] { return !ring_thread_ || flying_ > 0; });
}

void IoEngine::close_inherited() {
  // No lock: another thread of the parent may have had it.
  if (ring_ && ring_->fd >= 0) ::close(ring_->fd);
  if (wake_ >= 0) ::close(wake_);
}

portakv_io_state IoEngine::state() {
  const std::lock_guard<std::mutex> lock(mutex_);
  portakv_io_state state = state_;
  state.movers = static_cast<int64_t>(movers_);
  return state;
}

// --- The ring's thread ------------------------------------------------------------------------

void IoEngine::run_ring() {
  bool first = true;
  while (true) {
    const bool opened = open_ring();
    std::unique_lock<std::mutex> lock(mutex_);
    if (first) {
      first = false;
      ring_answered_ = true;
      changed_.notify_all();
      if (!opened) break;
    }
    if (opened) {
      lock.unlock();
      serve_ring(*ring_);
      lock.lock();
      ring_.reset();
    } else {
      // Other threads serve this time; the next batch looks for a ring again.
      for (const auto &batch : batches_) {
        for (; batch->begun < batch->requests.size(); ++batch->begun) {
          todo_.push_back({batch, batch->begun, Step::kMove});
          start_mover();
        }
      }
      batches_.clear();
      work_.notify_all();
      if (!movers_) {
        std::deque<Work> left;
        left.swap(todo_);
        lock.unlock();
        for (const Work &work : left) carry_out(work);
        lock.lock();
      }
    }
    changed_.wait(lock, [this] { return closed_ || !batches_.empty(); });
    if (closed_) break;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ring_thread_ = false;
  ::close(wake_);
  wake_ = -1;
  changed_.notify_all();
  work_.notify_all();
}

bool IoEngine::open_ring() {
  auto ring = std::make_unique<IoRing>(system_);
  // One more, for the eventfd that wakes the thread.
  int64_t code = ring->open(static_cast<uint32_t>(depth_ + 1));
  const int64_t registered = code < 0 ? 0 : ring->enroll(memory_);
  const std::lock_guard<std::mutex> lock(mutex_);
  state_.refused = code;
  if (code < 0) return false;
  state_.registered = registered;
  state_.rings += 1;
  ring_ = std::move(ring);
  return true;
}

// Serve until the engine is closed, or the ring must not be used again.
void IoEngine::serve_ring(IoRing &ring) {
  while (true) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      put_requests(ring);
      if (closed_ && flying_ == 0) return;
      if (!ring.wakes) ring.put_wake(wake_);
      ring_sleeps_ = true;
    }
    const int64_t code = ring.enter(1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ring_sleeps_ = false;
    }
    if (code < 0) {
      if (code != -EINTR && code != -EAGAIN && code != -EBUSY) {
        fail_ring(ring, code);
        return;
      }
      pause_for_a_millisecond();  // short of memory, the kernel may report so again immediately
    }
    note_ends(ring);
    if (ring.poisoned) {
      drain(ring);
      return;
    }
  }
}

// Put what the depth of each batch admits. The caller has the lock.
void IoEngine::put_requests(IoRing &ring) {
  const auto admits = [this](const IoBatch &batch) {
    return batch.begun < batch.requests.size() && batch.in_flight < depth_;
  };
  for (auto each = batches_.begin(); each != batches_.end();) {
    const std::shared_ptr<IoBatch> batch = *each;
    while (admits(*batch) && ring.free_entries() > 1) {
      const size_t number = batch->begun++;
      if (batch->requests[number].nbytes < 0) {
        batch->end(number, -ECANCELED);
        continue;
      }
      ring.put(batch, number);
      batch->in_flight += 1;
      flying_ += 1;
    }
    if (batch->begun == batch->requests.size()) {
      each = batches_.erase(each);
    } else {
      ++each;
    }
  }
}

void IoEngine::note_ends(IoRing &ring) {
  // Reads to verify. The last one is verified here, where it costs no change of threads.
  std::vector<Work> reads;
  ring.each_end([this, &reads](const Flight &flight, int64_t result) {
    flight.batch->in_flight -= 1;
    flying_ -= 1;
    const int64_t nbytes = flight.batch->requests[flight.number].nbytes;
    const bool again = result == -EINTR || result == -EAGAIN || result == -EINVAL;  // not aligned
    if (again || (result >= 0 && result < nbytes)) {
      push({flight.batch, flight.number, Step::kMoveAgain});
    } else if (result < 0 || !flight.batch->requests[flight.number].check.count) {
      flight.batch->end(flight.number, result);
    } else {
      reads.push_back({flight.batch, flight.number, Step::kVerify});
    }
  });
  for (size_t i = 0; i < reads.size(); ++i) {
    const bool is_long = reads[i].batch->requests[reads[i].number].nbytes >= kLong;
    if (is_long && i + 1 < reads.size()) {
      push(reads[i]);
    } else {
      carry_out(reads[i]);
    }
  }
}

// End what the ring was not given by the code of its failure, and wait for the rest.
void IoEngine::fail_ring(IoRing &ring, int64_t code) {
  std::deque<std::shared_ptr<IoBatch>> left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    left.swap(batches_);
  }
  for (const Flight &flight : ring.take_back()) {
    flight.batch->in_flight -= 1;
    flying_ -= 1;
    flight.batch->end(flight.number, code);
  }
  for (const auto &batch : left) {
    for (; batch->begun < batch->requests.size(); ++batch->begun) batch->end(batch->begun, code);
  }
  drain(ring);
}

// Wait until the ring has nothing under way. Requests whose ends it never reported are cancelled:
// no report proves that their bytes came.
void IoEngine::drain(IoRing &ring) {
  if (ring.wakes) eventfd_write(wake_, 1);
  while (ring.outstanding()) {
    if (ring.enter(1) < 0) pause_for_a_millisecond();
    note_ends(ring);
  }
  for (const Flight &flight : ring.lost()) {
    flight.batch->in_flight -= 1;
    flying_ -= 1;
    flight.batch->end(flight.number, -ECANCELED);
  }
}

// --- Movers -----------------------------------------------------------------------------------

// Have a mover carry out work, or do so here if there is none.
void IoEngine::push(Work work) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    todo_.push_back(work);
    start_mover();
    if (movers_) {
      work_.notify_one();
      return;
    }
    todo_.pop_back();
  }
  carry_out(work);
}

// Start a mover if there is more work than idle ones. The caller has the lock.
bool IoEngine::start_mover() {
  if (todo_.size() <= idle_ || movers_ >= std::min(kMostMovers, depth_)) return false;
  if (system_.admit()) return false;
  const auto self = shared_from_this();
  if (start_thread("portakv io", [self] { self->run_mover(); }) < 0) return false;
  movers_ += 1;
  return true;
}

void IoEngine::run_mover() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    if (todo_.empty()) {
      if (closed_ && !ring_thread_) break;
      idle_ += 1;
      work_.wait(lock);
      idle_ -= 1;
      continue;
    }
    Work work = std::move(todo_.front());
    todo_.pop_front();
    lock.unlock();
    carry_out(work);
    work.batch.reset();  // an idle thread holds nothing
    lock.lock();
  }
  movers_ -= 1;
}

void IoEngine::carry_out(const Work &work) {
  const IoRequest &request = work.batch->requests[work.number];
  int64_t result = request.nbytes;
  if (work.step != Step::kVerify) result = move(request);
  if (result == request.nbytes && request.check.count && !is_right(request.check)) {
    result = PORTAKV_IO_WRONG;
  }
  work.batch->end(work.number, result);
}

// Carry out one request. What O_DIRECT refuses for its alignment goes through the page cache, by
// another descriptor of the same file.
int64_t IoEngine::move(const IoRequest &request) const {
  if (request.nbytes < 0) return -ECANCELED;
  int fd = request.fd;
  int64_t moved = 0;
  int64_t code = 0;
  while (moved < request.nbytes) {
    const int64_t got = system_.move(fd, request.address + moved, request.nbytes - moved,
                                     request.offset + moved, request.write);
    if (got == -EINTR) continue;
    if (got == -EINVAL && fd == request.fd) {
      const int mode = fcntl(fd, F_GETFL);
      code = got;
      if (mode < 0 || !(mode & O_DIRECT)) break;
      char path[32];
      std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
      const int other = ::open(path, (mode & O_ACCMODE) | O_CLOEXEC);
      code = other < 0 ? -errno : 0;
      if (other < 0) break;
      fd = other;
      continue;
    }
    code = got ? got : -ENODATA;
    if (got <= 0) break;
    code = 0;
    moved += got;
  }
  if (fd != request.fd) ::close(fd);
  return code < 0 ? code : moved;
}

}  // namespace portakv

// --- The contract -----------------------------------------------------------------------------

struct portakv_io {
  std::shared_ptr<portakv::IoEngine> engine;
};

struct portakv_io_batch {
  std::shared_ptr<portakv::IoBatch> batch;
};

portakv_io *portakv_io_open(const portakv_io_terms *terms, int64_t *code) {
  using namespace portakv;
  *code = -ENOMEM;
  try {
    std::vector<std::pair<int64_t, int64_t>> memory;
    for (int64_t i = 0; i < terms->parts; ++i) {
      memory.emplace_back(terms->memory[2 * i], terms->memory[2 * i + 1]);
    }
    const portakv_io_system &system = terms->system ? *terms->system : kSystem;
    auto engine = std::make_shared<IoEngine>(terms->ring != 0, terms->depth, memory, system);
    *code = engine->start();
    return *code < 0 ? nullptr : new portakv_io{engine};
  } catch (...) {
    return nullptr;
  }
}

void portakv_io_look(portakv_io *io, portakv_io_state *out) { *out = io->engine->state(); }

int portakv_io_begin(portakv_io *io, portakv_io_batch **batch, const int64_t *requests,
                     const int64_t *checks, int64_t count, int each) {
  using namespace portakv;
  try {
    std::vector<IoRequest> all(static_cast<size_t>(count));
    for (IoRequest &request : all) {
      request.fd = static_cast<int>(requests[0]);
      request.offset = requests[1];
      request.address = reinterpret_cast<unsigned char *>(requests[2]);
      request.nbytes = requests[3];
      request.write = requests[4] != 0;
      requests += 5;
      request.check = {};
      if (!checks) continue;
      request.check = {reinterpret_cast<const unsigned char *>(checks[0]),
                       reinterpret_cast<const int64_t *>(checks[1]), checks[2],
                       static_cast<uint64_t>(checks[3]),
                       reinterpret_cast<const uint64_t *>(checks[4])};
      checks += 5;
    }
    auto made = std::make_shared<IoBatch>(std::move(all), each != 0);
    *batch = new portakv_io_batch{made};
    io->engine->begin(made);
    return 0;
  } catch (...) {
    return PORTAKV_NO_MEMORY;
  }
}

int64_t portakv_io_wait(portakv_io_batch *batch, int64_t *ends, int64_t room,
                        int64_t milliseconds) {
  return batch->batch->wait(ends, room, milliseconds);
}

void portakv_io_cancel(portakv_io *io, portakv_io_batch *batch) {
  io->engine->cancel(batch->batch);
}

void portakv_io_release(portakv_io_batch *batch) { delete batch; }

void portakv_io_close(portakv_io *io) { io->engine->close(); }

void portakv_io_free(portakv_io *io) {
  io->engine->close();
  delete io;
}

void portakv_io_forked(portakv_io *io) { io->engine->close_inherited(); }

#else

portakv_io *portakv_io_open(const portakv_io_terms *, int64_t *code) {
  *code = -ENOTSUP;
  return nullptr;
}

void portakv_io_look(portakv_io *, portakv_io_state *) {}

int portakv_io_begin(portakv_io *, portakv_io_batch **, const int64_t *, const int64_t *, int64_t,
                     int) {
  return PORTAKV_NO_MEMORY;
}

int64_t portakv_io_wait(portakv_io_batch *, int64_t *, int64_t, int64_t) { return 0; }

void portakv_io_cancel(portakv_io *, portakv_io_batch *) {}

void portakv_io_release(portakv_io_batch *) {}

void portakv_io_close(portakv_io *) {}

void portakv_io_free(portakv_io *) {}

void portakv_io_forked(portakv_io *) {}

#endif
