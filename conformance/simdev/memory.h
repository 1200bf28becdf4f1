// SPDX-License-Identifier: Apache-2.0
// Device and pinned memory: its owner, and its state after it is freed.
//
// As in a caching allocator, memory is freed in the order of the stream that it was allocated on.
// The free waits for recorded streams; work on other streams reads poison, or bytes of another
// tensor.
#pragma once

#include "jobs.h"

#include <signal.h>
#include <unistd.h>

namespace {

size_t rounded(size_t bytes) {
  size_t size = (bytes + kPage - 1) / kPage * kPage;
  if (size > kPooled) return size;
  size_t power = kPage;
  while (power < size) power *= 2;
  return power;
}

void* acquire(size_t bytes, BlockPtr block) {
  block->bytes = bytes;
  std::lock_guard lock(registry_mutex);
  holders[block.get()] = block;
  return block->address;
}

// A block that was freed on this stream, or null. A block whose free is still pending is not taken:
// a wait for it would hurry the stream's other work.
BlockPtr pooled(Queue* queue, size_t size) {  // the mutex is held
  auto& free = machine.pool[{queue, size}];
  for (auto it = free.rbegin(); it != free.rend(); ++it) {
    if (!ended(it->second)) continue;
    BlockPtr block = it->first;
    free.erase(std::next(it).base());
    --machine.kept;
    return block;
  }
  return nullptr;
}

void drop_pool() {  // streams come and go, and nothing uses the blocks of an old one
  machine.kept = 0;
  auto is_over = [](const auto& free) { return ended(free.second); };
  for (auto& [key, free] : machine.pool) {
    free.erase(std::remove_if(free.begin(), free.end(), is_over), free.end());
    machine.kept += free.size();
  }
  std::erase_if(machine.pool, [](const auto& entry) { return entry.second.empty(); });
}

void end_tenancy(Block& block, uint64_t tenant) {
  if (block.size <= kPooled) memset(block.alias, kPoison, block.size);
  else mprotect(block.alias, block.size, PROT_NONE);
  block.ended = tenant + 1;
}

void release(void* context) {
  BlockPtr block;
  {
    std::lock_guard lock(registry_mutex);
    auto held = holders.find(static_cast<Block*>(context));
    block = held->second;
    holders.erase(held);
  }
  if (block->device == kHost || forked) return;  // jobs that still read pinned memory own it
  std::lock_guard lock(machine.mutex);
  uint64_t tenant = block->tenant++;
  auto work = [at = block.get(), tenant] { end_tenancy(*at, tenant); };
  JobPtr end = make(block->home, "free", {{block, true, tenant}}, work);
  append(end);
  for (Queue* queue : block->recorded) {
    follow(*end, queue->fence);  // other users may have been joined to the recorded stream
    follow_users(*end, queue);
  }
  block->recorded.clear();
  if (block->size > kPooled) return;
  if (machine.kept >= kKept) drop_pool();
  machine.pool[{block->home, block->size}].emplace_back(block, end);
  ++machine.kept;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device device(kType, current_device);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    BlockPtr block;
    {
      std::lock_guard lock(machine.mutex);
      check_process();
      Queue* queue = queue_of(current_device, current_stream[current_device]);
      block = pooled(queue, rounded(bytes));
      if (!block) block = std::make_shared<Block>(bytes, rounded(bytes), current_device);
      block->home = queue;
    }
    Block* context = block.get();
    return {acquire(bytes, std::move(block)), context, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "simdev: the host cannot copy device memory.");
  }
} memory;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::kCPU};
    auto block = std::make_shared<Block>(bytes, rounded(bytes), kHost);
    Block* context = block.get();
    return {acquire(bytes, std::move(block)), context, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} pinned_memory;

struct sigaction previous[2];

void on_fault(int number, siginfo_t* facts, void*) {
  if (running) {
    fault_address = facts->si_addr;
    siglongjmp(escape, 1);
  }
  // Memory that the host may not touch belongs to a device, or is not allocated. The search takes
  // no lock: the thread that was stopped here may hold it.
  auto next = registry.upper_bound(reinterpret_cast<uintptr_t>(facts->si_addr));
  Block* block = next == registry.begin() ? nullptr : std::prev(next)->second;
  bool ours = block && facts->si_addr < block->address + block->mapped;
  char text[] = "simdev: the host touched memory of the simulated device outside of a job, or ran "
                "past pinned memory. Copy device memory to the host before it is read there.\n";
  if (ours && write(2, text, sizeof text - 1) < 0) _exit(139);
  sigaction(number, &previous[number == SIGBUS], nullptr);  // it handles the repeated fault
}

}  // namespace
