// SPDX-License-Identifier: Apache-2.0
// Jobs on streams: the memory that they touch, the jobs that they wait for, and their order.
//
// A job runs in its device's worker thread, and only when it is needed: the host waits for it, or a
// job runs after it. The scheduler takes the worst order that streams and events allow: jobs that
// are not ordered and touch the same memory run in the reverse order of their launch. A missing
// wait therefore gives wrong bytes each time, and not only when a thread happens to be slow.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
constexpr int kHost = -1;               // the device of pinned memory
constexpr size_t kPage = 4096;
constexpr size_t kPooled = 64u << 20;   // larger blocks are unmapped when they are freed
constexpr size_t kPending = 2048;       // jobs; beyond it the oldest is run
constexpr size_t kKept = 1024;          // freed blocks; beyond it they are unmapped
constexpr int kPatience = 16;           // queries in vain before the device begins to work
constexpr int kPoison = 0xDB;
constexpr char kForked[] = "simdev: this process was forked from one that had used the device; "
                           "start it with the method 'spawn'.";

struct Job;
using JobPtr = std::shared_ptr<Job>;

// A stream. Its jobs run in the order of their launch only where the order is visible: jobs that
// touch the same memory, and all jobs after a wait. An operator that blocks the host does not
// complete other jobs, because that would hide a missing wait elsewhere.
struct Queue {
  int device;
  int64_t id;
  std::vector<JobPtr> open;  // the jobs that an event or a wait of the host waits for
  JobPtr fence;              // the last wait: all jobs launched later run after it
  JobPtr probe;              // the job that a query of the stream looks at
};

std::mutex registry_mutex;
struct Block;
auto& registry = *new std::map<uintptr_t, Block*>;  // by address; leaked, as threads outlive main

struct Block {  // memory, of one tenant after another
  char *address, *alias;  // the address that the program sees, and the address of the bytes
  size_t bytes, size, mapped;
  int device;
  Queue* home = nullptr;  // the stream on which it was allocated
  uint64_t tenant = 0;    // counts the tenants that freed it
  uint64_t ended = 0;     // tenants whose memory is gone
  std::set<Queue*> recorded;
  std::vector<std::pair<JobPtr, bool>> users;  // pending jobs that touch it, and whether they write

  Block(size_t requested, size_t rounded, int on) : bytes(requested), size(rounded), device(on) {
    mapped = on == kHost ? size + 2 * kPage : 2 * size + 3 * kPage;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* all = mmap(nullptr, mapped, PROT_NONE, flags, -1, 0);
    TORCH_CHECK(all != MAP_FAILED, "simdev: requested ", requested, " bytes, but this machine has "
                "no address space for them: out of memory.");
    address = static_cast<char*>(all) + kPage;
    alias = on == kHost ? address : address + size + kPage;
    mprotect(alias, size, PROT_READ | PROT_WRITE);
    if (size <= kPooled) memset(alias, kPoison, size);
    std::lock_guard lock(registry_mutex);
    registry[reinterpret_cast<uintptr_t>(address)] = this;
  }
  ~Block() {
    {
      std::lock_guard lock(registry_mutex);
      registry.erase(reinterpret_cast<uintptr_t>(address));
    }
    munmap(address - kPage, mapped);
  }
};
using BlockPtr = std::shared_ptr<Block>;
auto& holders = *new std::map<Block*, BlockPtr>;  // blocks with a tenant

struct Touch {
  BlockPtr block;
  bool writes;
  uint64_t tenant;
};

void note(std::vector<Touch>& touches, const BlockPtr& block, bool writes) {
  for (Touch& known : touches)
    if (known.block == block) {
      known.writes |= writes;
      return;
    }
  touches.push_back({block, writes, block->tenant});
}

enum class State { pending, ordered, done };
struct Job {
  uint64_t number;
  Queue* queue;
  std::string name;
  std::vector<JobPtr> after;
  std::vector<Touch> touches;
  std::function<void()> work;
  bool awaited = false;  // its launcher waits for it and raises its error
  State state = State::pending;
  std::exception_ptr error;
  std::chrono::steady_clock::time_point ended;
  int queries = 0;
};

struct Machine {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::pair<int, int64_t>, std::unique_ptr<Queue>> queues;
  std::map<uint64_t, JobPtr> pending;
  std::deque<JobPtr> order;  // the jobs for the workers, one at a time
  std::map<std::pair<Queue*, size_t>, std::vector<std::pair<BlockPtr, JobPtr>>> pool;
  std::vector<std::string> faults;
  std::set<std::string> waited;  // operations that had to wait for the device
  size_t kept = 0;  // in the pool
  uint64_t jobs = 0;
  int64_t streams = 0, launches = 0, waits = 0;  // of any thread's
  bool busy = false, early = false, working = false;
};
auto& machine = *new Machine;
std::atomic<bool> forked = false;
thread_local int current_device = 0;
thread_local std::array<int64_t, kDevices> current_stream{};
using c10::Stream;
Stream stream_of(int device) {  // the current one
  return Stream(Stream::UNSAFE, c10::Device(kType, device), current_stream[device]);
}

thread_local Job* running = nullptr;
thread_local sigjmp_buf escape;
thread_local void* fault_address = nullptr;

std::string described(const Job& job) {
  auto text = c10::str(job.name, " on stream ", job.queue->id, " of ");
  return c10::str(text, c10::get_privateuse1_backend(), ":", job.queue->device);
}

BlockPtr find(const void* at) {  // the block with a tenant around an address, or null
  std::lock_guard lock(registry_mutex);
  auto next = registry.upper_bound(reinterpret_cast<uintptr_t>(at));
  if (next == registry.begin()) return nullptr;
  Block* block = std::prev(next)->second;
  auto held = holders.find(block);
  bool within = static_cast<const char*>(at) < block->address + block->size;
  return within && held != holders.end() ? held->second : nullptr;
}

// --- order -----------------------------------------------------------------------------------

bool ended(const JobPtr& job) { return !job || job->state == State::done; }

bool may_precede(const JobPtr& job, const std::set<Job*>& open, std::set<Job*>& seen) {
  if (open.count(job.get())) return false;
  if (job->state != State::pending || !seen.insert(job.get()).second) return true;
  return std::all_of(job->after.begin(), job->after.end(),
                     [&](const JobPtr& first) { return may_precede(first, open, seen); });
}

// Jobs launched later on other streams, in the same memory; latest first.
std::vector<JobPtr> rivals(const Job& job) {
  std::map<uint64_t, JobPtr, std::greater<>> found;
  for (const Touch& touch : job.touches)
    for (const auto& [user, writes] : touch.block->users)
      if (user->queue != job.queue && user->number > job.number && (writes || touch.writes))
        found[user->number] = user;
  std::vector<JobPtr> listed;
  for (auto& entry : found) listed.push_back(entry.second);
  return listed;
}

// Give a job to the workers, after the jobs that it follows and the jobs that it need not precede.
void pursue(const JobPtr& job, std::set<Job*>& open) {
  if (job->state != State::pending || !open.insert(job.get()).second) return;
  for (const JobPtr& rival : rivals(*job)) {
    std::set<Job*> seen;
    if (may_precede(rival, open, seen)) pursue(rival, open);
  }
  for (const JobPtr& first : job->after) pursue(first, open);
  open.erase(job.get());
  job->state = State::ordered;
  machine.order.push_back(job);
}

void start(const JobPtr& job) {  // the mutex is held
  std::set<Job*> open;
  pursue(job, open);
  machine.changed.notify_all();
}

void finish(std::unique_lock<std::mutex>& lock, const JobPtr& job) {
  start(job);
  machine.changed.wait(lock, [&] { return ended(job); });
}

void need(const JobPtr& job) {
  TORCH_CHECK(!job || !forked, kForked);
  std::unique_lock lock(machine.mutex);
  if (!ended(job)) finish(lock, job);
}

void raise_faults() {
  std::vector<std::string> faults;
  {
    std::lock_guard lock(machine.mutex);
    faults.swap(machine.faults);
  }
  if (faults.empty()) return;
  auto text = faults.front();
  if (faults.size() > 1) text = c10::str(text, " (and ", faults.size() - 1, " more)");
  TORCH_CHECK(false, text);
}

void wait_for(const JobPtr& job) {
  {
    std::lock_guard lock(machine.mutex);
    ++machine.waits;
  }
  need(job);
  raise_faults();
}

void report(std::string text) {
  std::lock_guard lock(machine.mutex);
  machine.faults.push_back("simdev: " + std::move(text));
}

void execute(Job& job) {
  running = &job;
  if (sigsetjmp(escape, 1) == 0) {
    job.work();
    running = nullptr;
    return;
  }
  running = nullptr;
  TORCH_CHECK(false, "it touched ", fault_address, ", outside of its tensors or in memory that was "
              "freed (illegal memory access)");
}

void run(Job& job) {
  for (const Touch& touch : job.touches)
    if (touch.block->ended > touch.tenant) {
      report(c10::str(described(job), " used ", touch.block->bytes, " bytes that were freed after "
                      "its launch. Its stream was not recorded with the allocator: call "
                      "tensor.record_stream(stream), or keep the tensor until the work ended."));
      break;  // and it runs all the same: it now reads poison
    }
  try {
    if (job.work) execute(job);
  } catch (const std::exception& error) {
    running = nullptr;
    auto* of_torch = dynamic_cast<const c10::Error*>(&error);
    auto why = of_torch ? of_torch->what_without_backtrace() : error.what();
    if (job.awaited) job.error = std::current_exception();
    else report(c10::str(described(job), " failed: ", why));
  }
  job.work = nullptr;
}

[[noreturn]] void serve(int device) {
  at::get_num_threads();  // torch sets this thread up now, and the next line overrides it
  auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set_threads) set_threads(1);
  at::AutoDispatchBelowADInplaceOrView plain;
  std::unique_lock lock(machine.mutex);
  for (;;) {
    machine.changed.wait(lock, [&] {
      return !machine.busy && !machine.order.empty() &&
             machine.order.front()->queue->device == device;
    });
    JobPtr job = machine.order.front();
    machine.order.pop_front();
    machine.busy = true;
    lock.unlock();
    run(*job);
    lock.lock();
    for (const Touch& touch : job->touches) {
      auto is_it = [&](const auto& user) { return user.first == job; };
      auto& users = touch.block->users;
      users.erase(std::remove_if(users.begin(), users.end(), is_it), users.end());
    }
    job->touches.clear();
    job->after.clear();
    job->state = State::done;
    job->ended = std::chrono::steady_clock::now();
    machine.pending.erase(job->number);
    machine.busy = false;
    machine.changed.notify_all();
  }
}

void check_process() {
  TORCH_CHECK(!forked, kForked);
  if (machine.working) return;
  machine.working = true;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  for (int device = 0; device < kDevices; ++device) std::thread(serve, device).detach();
}

Queue* queue_of(int device, int64_t id) {  // the mutex is held
  auto& found = machine.queues[{device, id}];
  if (!found) found.reset(new Queue{device, id, {}, nullptr, nullptr});
  return found.get();
}

JobPtr make(Queue* queue, std::string name, std::vector<Touch> touches,
            std::function<void()> work) {
  check_process();  // the mutex is held
  JobPtr job(new Job{++machine.jobs, queue, std::move(name), {}, std::move(touches),
                     std::move(work)});
  for (const Touch& touch : job->touches) touch.block->users.emplace_back(job, touch.writes);
  machine.pending[job->number] = job;
  return job;
}

void follow(Job& job, const JobPtr& first) {
  if (!ended(first)) job.after.push_back(first);
}

// Order a job after the jobs of a stream that touch the same memory: after the last job that
// writes, which follows all jobs before it, and after the jobs since. A list of all jobs would take
// the cube of their number.
void follow_users(Job& job, const Queue* queue) {
  for (const Touch& touch : job.touches) {
    const auto& users = touch.block->users;
    for (auto each = users.rbegin(); each != users.rend(); ++each) {
      const auto& [user, writes] = *each;
      bool meets = user->queue == queue && user->number < job.number && (writes || touch.writes);
      if (meets) follow(job, user);
      if (meets && writes) break;
    }
  }
}

void append(const JobPtr& job) {
  Queue& queue = *job->queue;
  follow(*job, queue.fence);
  follow_users(*job, &queue);
  queue.open.erase(std::remove_if(queue.open.begin(), queue.open.end(), ended), queue.open.end());
  queue.open.push_back(job);
}

JobPtr launch(const Stream& stream, std::string name, std::vector<Touch> touches,
              std::function<void()> work, bool awaited = false) {
  JobPtr job, urgent;
  {
    std::lock_guard lock(machine.mutex);
    Queue* queue = queue_of(stream.device_index(), stream.id());
    job = make(queue, std::move(name), std::move(touches), std::move(work));
    append(job);
    job->awaited = awaited;
    ++machine.launches;
    machine.waits += awaited;
    if (machine.early || awaited) urgent = job;
    else if (machine.pending.size() > kPending) urgent = machine.pending.begin()->second;
  }
  need(urgent);
  if (job->error) std::rethrow_exception(job->error);
  return job;
}

// A job that ends when all jobs of a stream have ended; null if they have.
JobPtr mark(const Stream& stream) {
  std::unique_lock lock(machine.mutex);
  Queue* queue = queue_of(stream.device_index(), stream.id());
  if (std::all_of(queue->open.begin(), queue->open.end(), ended)) return nullptr;
  JobPtr job = make(queue, "an event", {}, nullptr);
  for (const JobPtr& first : queue->open) follow(*job, first);
  queue->open = {job};
  if (machine.early) finish(lock, job);
  return job;
}

// Order all later jobs of a stream after `first`, and after some work.
void fence(const Stream& stream, const JobPtr& first, std::function<void()> work = nullptr) {
  std::unique_lock lock(machine.mutex);
  if (ended(first) && !work) return;
  Queue* queue = queue_of(stream.device_index(), stream.id());
  JobPtr job = make(queue, "a wait", {}, std::move(work));
  append(job);
  follow(*job, first);
  queue->fence = job;
  if (machine.early) finish(lock, job);
}

}  // namespace
