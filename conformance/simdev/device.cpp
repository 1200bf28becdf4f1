// SPDX-License-Identifier: Apache-2.0
// A simulated accelerator on torch's PrivateUse1: the functions that torch and Python call.
#include "operators.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>

namespace {

// --- devices, streams and events ---------------------------------------------------------------

struct Event {
  JobPtr job;  // null: ended
  std::chrono::steady_clock::time_point recorded;
  auto time() const { return job ? job->ended : recorded; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return c10::Device(kType, current_device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto old = getDevice();
    setDevice(device);
    return old;
  }
  void setDevice(c10::Device device) const override {
    int index = device.index();
    TORCH_CHECK(index >= -1 && index < kDevices, "simdev: expected a device below ", kDevices,
                ", counted from 0, got ", index, ".");
    if (index >= 0) current_device = index;
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  static c10::Device indexed(c10::Device device) {
    return c10::Device(kType, device.has_index() ? device.index() : current_device);
  }
  Stream getStream(c10::Device device) const override { return stream_of(indexed(device).index()); }
  Stream getDefaultStream(c10::Device device) const override {
    return Stream(Stream::DEFAULT, indexed(device));
  }
  Stream getNewStream(c10::Device device, int = 0) const override {
    std::lock_guard lock(machine.mutex);
    return Stream(Stream::UNSAFE, indexed(device), ++machine.streams);
  }
  Stream getStreamFromGlobalPool(c10::Device device, bool = false) const override {
    return getNewStream(device);
  }
  Stream exchangeStream(Stream stream) const override {
    auto old = stream_of(stream.device_index());
    current_stream[stream.device_index()] = stream.id();
    return old;
  }
  bool queryStream(const Stream& stream) const override {
    JobPtr now = mark(stream);
    if (!now) return true;
    Queue* queue;
    {
      std::lock_guard lock(machine.mutex);
      queue = queue_of(stream.device_index(), stream.id());
      if (ended(queue->probe)) queue->probe = now;
    }
    query(queue->probe);
    return false;
  }
  void synchronizeStream(const Stream& stream) const override { wait_for(mark(stream)); }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    for (bool first = true;;) {
      JobPtr latest;
      {
        std::lock_guard lock(machine.mutex);
        machine.waits += first;
        first = false;
        for (const auto& entry : machine.pending)
          if (entry.second->queue->device == device) latest = entry.second;
      }
      if (!latest) break;
      need(latest);
    }
    raise_faults();
  }
  void record(void** event, const Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    auto& recorded = *static_cast<Event*>(*event);
    recorded = {mark(stream), std::chrono::steady_clock::now()};
  }
  void block(void* event, const Stream& stream) const override {
    if (event) fence(stream, static_cast<Event*>(event)->job);
  }
  bool queryEvent(void* event) const override {
    return !event || query(static_cast<Event*>(event)->job);
  }
  void synchronizeEvent(void* event) const override {
    if (event) wait_for(static_cast<Event*>(event)->job);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto &a = *static_cast<Event*>(first), &b = *static_cast<Event*>(second);
    TORCH_CHECK(query(a.job) && query(b.job), "simdev: expected events that have ended, got a "
                "pending event; synchronize them first.");
    return std::chrono::duration<double, std::milli>(b.time() - a.time()).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& at, const Stream& stream) const override {
    BlockPtr block = find(at.get());
    std::lock_guard lock(machine.mutex);
    Queue* queue = queue_of(stream.device_index(), stream.id());
    if (block && queue != block->home) block->recorded.insert(queue);
  }

 private:
  static bool query(const JobPtr& job) {  // after enough queries the device begins to work
    std::lock_guard lock(machine.mutex);
    if (job && job->state == State::pending && ++job->queries >= kPatience) start(job);
    return !job || job->state == State::done;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return !forked; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchangeDevice(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice(c10::Device(kType, device)).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  c10::Device getDeviceFromPtr(void* at) const override {
    BlockPtr block = find(at);
    TORCH_CHECK(block && block->device != kHost, "simdev: ", at, " is no address of a device.");
    return c10::Device(kType, block->device);
  }
  bool isPinnedPtr(const void* at) const override {
    BlockPtr block = find(at);
    return block && block->device == kHost;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override;
};

// --- the device's own operators ------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only tensors of the host can be pinned.");
  c10::DeviceGuard guard(Guard::indexed(device.value_or(c10::Device(kType))));
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only tensors of the host can be pinned.");
  c10::DeviceGuard guard(Guard::indexed(device.value_or(c10::Device(kType))));
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

void set_bytes(c10::StorageImpl* storage, size_t bytes) {
  c10::DeviceGuard guard(storage->device());
  size_t kept = std::min(bytes, storage->nbytes());
  c10::DataPtr fresh = memory.allocate(bytes);
  BlockPtr to = find(fresh.get()), from = find(storage->data());
  if (kept)
    launch(stream_of(current_device), "a resize",
           {{to, true, to->tenant}, {from, false, from->tenant}},
           [to = to->alias, from = from->alias, kept] { memcpy(to, from, kept); });
  storage->set_data_ptr(std::move(fresh));
  storage->set_nbytes(bytes);
}

void Hooks::resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const {
  set_bytes(storage.unsafeGetStorageImpl(), bytes);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  auto* facts = self.unsafeGetTensorImpl();
  size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.itemsize(),
                                                            self.storage_offset());
  if (bytes > self.storage().nbytes()) set_bytes(self.storage().unsafeGetStorageImpl(), bytes);
  facts->set_sizes_contiguous(size);
  if (format) facts->empty_tensor_restride(*format);
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  Tensor there = at::empty({}, self.options().device(c10::kCPU));
  copy_from(self, there, false);
  return there.item();
}

void record_stream(Tensor& self, Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  return at::cpu::set_(self, std::move(storage), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, c10::Storage storage) {
  auto size = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return at::cpu::set_(self, std::move(storage), 0, {size}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(),
                       source.strides());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&operate>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("record_stream", &record_stream);
}

// --- functions for Python ------------------------------------------------------------------------

Stream given(int64_t device, int64_t id) {
  return Stream(Stream::UNSAFE, c10::Device(kType, static_cast<c10::DeviceIndex>(device)), id);
}

void delay(int64_t device, int64_t stream, int64_t milliseconds) {
  fence(given(device, stream), nullptr,
        [=] { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); });
}

struct Run {
  char *to, *from;
  size_t bytes;
};

// The alias of `bytes` of device or pinned memory, from an address on.
char* reached(int64_t address, int64_t bytes, int64_t device, bool writes,
              std::vector<Touch>& touches) {
  auto* at = reinterpret_cast<char*>(address);
  BlockPtr block = find(at);
  TORCH_CHECK(block && at + bytes <= block->address + block->bytes, "copy_runs was given ", bytes,
              " bytes at ", address, ", which lie in no allocation of a device and no pinned one.");
  TORCH_CHECK(block->device == kHost || block->device == device, "copy_runs was given memory of ",
              "device ", block->device, " on a stream of device ", device, "; it reaches its own "
              "device and pinned memory.");
  note(touches, block, writes);
  return block->alias + (at - block->address);
}

void copy_runs(const Tensor& src, const Tensor& dst, const Tensor& bytes, int64_t device,
               int64_t stream) {
  std::vector<Run> runs;
  std::vector<Touch> touches;
  auto* from = src.const_data_ptr<int64_t>();
  auto* to = dst.const_data_ptr<int64_t>();
  auto* sizes = bytes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    TORCH_CHECK(sizes[i] >= 0, "copy_runs was given a run of ", sizes[i], " bytes.");
    if (sizes[i] == 0) continue;
    char* target = reached(to[i], sizes[i], device, true, touches);
    runs.push_back({target, reached(from[i], sizes[i], device, false, touches),
                    static_cast<size_t>(sizes[i])});
  }
  launch(given(device, stream), "copy_runs", std::move(touches), [runs = std::move(runs)] {
    for (const Run& run : runs) memmove(run.to, run.from, run.bytes);
  });
}

std::vector<std::string> taken_faults() {
  std::vector<std::string> faults;
  std::lock_guard lock(machine.mutex);
  faults.swap(machine.faults);
  return faults;
}

std::vector<std::string> waited() {
  std::lock_guard lock(machine.mutex);
  return {machine.waited.begin(), machine.waited.end()};
}

std::vector<int64_t> counted() {
  std::lock_guard lock(machine.mutex);
  return {machine.launches, machine.waits};
}

void run_early(bool early) {
  std::unique_lock lock(machine.mutex);
  machine.early = early;
  while (early && !machine.pending.empty()) {
    JobPtr first = machine.pending.begin()->second;  // the job erases itself
    finish(lock, first);
  }
}

void power_on() {
  c10::SetAllocator(kType, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous[0]);
  sigaction(SIGBUS, &action, &previous[1]);
}

TORCH_LIBRARY(portakv_simdev, m) {
  m.def("power_on() -> ()", &power_on);
  m.def("device_count() -> int", [] { return int64_t{kDevices}; });
  m.def("delay(int device, int stream, int milliseconds) -> ()", &delay);
  m.def("copy_runs(Tensor src, Tensor dst, Tensor nbytes, int device, int stream) -> ()",
        &copy_runs);
  m.def("taken_faults() -> str[]", &taken_faults);
  m.def("waited() -> str[]", &waited);
  m.def("counted() -> int[]", &counted);
  m.def("run_early(bool early) -> ()", &run_early);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace
