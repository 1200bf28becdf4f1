// SPDX-License-Identifier: Apache-2.0
// A simulated accelerator on torch's PrivateUse1: torch's hooks, and its operators as jobs.
//
// An operator's results get their shapes from torch's Meta kernel when it is launched, and their
// bytes from the CPU kernel when the job runs. Where shapes depend on values the launch waits.
#include "memory.h"

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
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::IValue;
using c10::Stream;

Stream stream_of(int device) {
  return Stream(Stream::UNSAFE, c10::Device(kType, device), current_stream[device]);
}

void wait_for(const JobPtr& job) {
  need(job);
  raise_faults();
}

// --- devices, streams and events ---------------------------------------------------------------

struct Event {
  JobPtr job;
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
    TORCH_CHECK(index >= -1 && index < kDevices, "simdev: device ", index, " was asked; there are ",
                kDevices, ", counted from 0.");
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
  bool queryStream(const Stream& stream) const override { return asked(last_of(stream)); }
  void synchronizeStream(const Stream& stream) const override { wait_for(last_of(stream)); }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    for (;;) {
      JobPtr latest;
      {
        std::lock_guard lock(machine.mutex);
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
    static_cast<Event*>(*event)->job = launch(stream, "an event", {}, nullptr);
  }
  void block(void* event, const Stream& stream) const override {
    if (event) launch(stream, "a wait", {}, nullptr, static_cast<Event*>(event)->job);
  }
  bool queryEvent(void* event) const override {
    return !event || asked(static_cast<Event*>(event)->job);
  }
  void synchronizeEvent(void* event) const override {
    if (event) wait_for(static_cast<Event*>(event)->job);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto &a = *static_cast<Event*>(first), &b = *static_cast<Event*>(second);
    TORCH_CHECK(asked(a.job) && asked(b.job), "simdev: the time between events that have not ended.");
    return std::chrono::duration<double, std::milli>(b.job->ended - a.job->ended).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& at, const Stream& stream) const override {
    BlockPtr block = find(at.get());
    std::lock_guard lock(machine.mutex);
    Queue* queue = queue_of(stream.device_index(), stream.id());
    if (block && queue != block->home) block->recorded.insert(queue);
  }

 private:
  static JobPtr last_of(const Stream& stream) {
    std::lock_guard lock(machine.mutex);
    return queue_of(stream.device_index(), stream.id())->last;
  }
  static bool asked(const JobPtr& job) {  // who asks often enough sees the device begin to work
    std::lock_guard lock(machine.mutex);
    if (job && job->state == State::pending && ++job->asked >= kPatience) start(job);
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

// --- what a job sees of a tensor -----------------------------------------------------------------

// Tensors over the same bytes for the CPU, or without bytes for Meta. They own nothing, and share
// storages as the originals do.
class Aliases {
 public:
  explicit Aliases(c10::Device device) : device_(device) {}
  std::vector<Touch> touches;

  Tensor of(const Tensor& tensor, bool writes) {
    TORCH_CHECK(tensor.layout() == at::kStrided, "simdev: only strided tensors are known here.");
    auto& kept = storages_[tensor.storage().unsafeGetStorageImpl()];
    if (!kept) kept = storage(tensor.storage());
    if (!device_.is_meta()) touch(tensor.storage().data(), writes);
    auto key = device_.is_meta() ? c10::DispatchKey::Meta : c10::DispatchKey::CPU;
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(kept), c10::DispatchKeySet(key), tensor.dtype());
    auto* facts = alias.unsafeGetTensorImpl();
    facts->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) facts->set_wrapped_number(true);
    alias._set_conj(tensor.is_conj());
    alias._set_neg(tensor.is_neg());
    return alias;
  }

 private:
  c10::Device device_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;

  c10::Storage storage(const c10::Storage& of) const {
    auto bytes = of.nbytes();
    auto* at = const_cast<void*>(of.data());
    if (device_.is_meta()) {
      auto* none = c10::GetAllocator(c10::kMeta);
      return c10::Storage(c10::Storage::use_byte_size_t(), bytes, none->allocate(bytes), none, true);
    }
    if (BlockPtr block = find(at)) at = block->alias + (static_cast<char*>(at) - block->address);
    return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(at, c10::kCPU));
  }
  void touch(const void* at, bool writes) {
    BlockPtr block = find(at);
    if (!block) return;
    for (Touch& known : touches)
      if (known.block == block) {
        known.writes |= writes;
        return;
      }
    touches.push_back({block, writes, block->tenant});
  }
};

void copy_on(const Stream& stream, const Tensor& to, const Tensor& from, bool waits, JobPtr behind) {
  Aliases aliases(c10::kCPU);
  auto target = aliases.of(to, true), source = aliases.of(from, false);
  auto work = [target, source] { target.copy_(source); };
  launch(stream, "a copy", std::move(aliases.touches), work, behind, waits);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView plain;
  if (to.numel() == 0) return to;
  bool here = to.device().type() == kType, there = from.device().type() == kType;
  Stream stream = stream_of(there ? from.device().index() : to.device().index());
  if (!there) {
    // A copy that blocks may read its source at once; only one that does not can be overtaken.
    bool later = non_blocking && Hooks().isPinnedPtr(from.storage().data());
    Tensor source = later ? from : from.clone();
    Aliases aliases(c10::kCPU);
    auto target = aliases.of(to, true), bytes = later ? aliases.of(from, false) : source;
    launch(stream, "a copy from the host", std::move(aliases.touches),
           [target, bytes] { target.copy_(bytes); });
  } else if (!here) {
    bool later = non_blocking && Hooks().isPinnedPtr(to.storage().data());
    copy_on(stream, to, from, !later, nullptr);
    if (!later) raise_faults();
  } else if (from.device() == to.device()) {
    copy_on(stream, to, from, false, nullptr);
  } else {
    Stream other = stream_of(to.device().index());
    copy_on(stream, to, from, false, launch(other, "an event", {}, nullptr));
    launch(other, "a wait", {}, nullptr, launch(stream, "an event", {}, nullptr));
  }
  return to;
}

// --- any operator ----------------------------------------------------------------------------------

IValue mapped(const IValue& value, c10::Device device, const std::function<Tensor(Tensor)>& to) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(to(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(to(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor && tensor->defined() ? std::optional(to(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isDevice()) return device;
  return value;
}

struct Call {  // one operator with its arguments
  const c10::OperatorHandle& op;
  std::vector<IValue> arguments;
  int device = -1;

  bool writes(size_t i) const {
    auto* alias = op.schema().arguments()[i].alias_info();
    return alias && alias->isWrite();
  }
  bool passed_on(size_t i) const { return op.schema().returns()[i].alias_info() != nullptr; }

  IValue argument_of(size_t result) const {  // the argument that a result is
    const auto& schema = op.schema();
    for (size_t i = 0; i < arguments.size(); ++i)
      if (schema.arguments()[i].alias_info() &&
          *schema.arguments()[i].alias_info() == *schema.returns()[result].alias_info())
        return arguments[i];
    TORCH_CHECK(false, "simdev: ", schema.name(), " returns an alias of none of its arguments.");
  }

  void check() {
    auto name = op.schema().name();
    bool indexes = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
    auto look = [&](const Tensor& tensor) {
      if (tensor.device().type() == kType) {
        int on = tensor.device().index();
        TORCH_CHECK(device < 0 || device == on, "Expected all tensors to be on the same device, but "
                    "found some on simulated devices ", device, " and ", on, " (", name, ").");
        device = on;
      } else {
        TORCH_CHECK(tensor.is_cpu() && (indexes || tensor.dim() == 0), "Expected all tensors to be "
                    "on the same device, but found one on ", tensor.device(), " (", name, ").");
      }
      return tensor;
    };
    for (const IValue& argument : arguments) mapped(argument, c10::kCPU, look);
    if (device < 0) device = current_device;
    for (const auto& result : op.schema().returns())
      TORCH_CHECK(!result.alias_info() || result.alias_info()->isWrite(), "simdev: ", name,
                  " returns a view, and the simulated device has no kernel for it.");
  }

  // The arguments on the CPU or on Meta. Host tensors are copied: their owner may change them.
  torch::jit::Stack on(Aliases& aliases, c10::Device home) const {
    torch::jit::Stack stack;
    for (size_t i = 0; i < arguments.size(); ++i)
      stack.push_back(mapped(arguments[i], home, [&](const Tensor& tensor) {
        if (tensor.device().type() == kType) return aliases.of(tensor, writes(i));
        return home.is_meta() && tensor.dim() ? aliases.of(tensor, false) : tensor.clone();
      }));
    return stack;
  }

  // What Meta says of the results; false where shapes depend on values, or where it does not know.
  bool foretell(torch::jit::Stack& results) const {
    for (const auto& result : op.schema().returns())
      if (!result.type()->isSubtypeOf(*c10::TensorType::get())) return false;
    Aliases aliases(c10::kMeta);
    results = on(aliases, c10::kMeta);
    try {
      op.callBoxed(&results);
      return true;
    } catch (const std::exception&) {  // a real mistake shows again when the CPU's kernel runs
      return false;
    }
  }
};

Tensor made(const Tensor& like, int device) {
  return at::empty_strided(like.sizes(), like.strides(), like.options().device(kType, device));
}

void launch_foretold(Call& call, torch::jit::Stack& results) {
  auto returned = call.op.schema().returns().size();
  for (size_t i = 0; i < returned; ++i) {
    Tensor told = results[i].toTensor();
    if (!call.passed_on(i)) {
      if (told.defined()) results[i] = made(told, call.device);
      continue;
    }
    Tensor given = call.argument_of(i).toTensor();
    if (given.sizes() != told.sizes()) given.resize_(told.sizes());
    results[i] = given;
  }
  Aliases aliases(c10::kCPU);
  auto stack = std::make_shared<torch::jit::Stack>(call.on(aliases, c10::kCPU));
  std::vector<Tensor> fresh(returned);
  for (size_t i = 0; i < returned; ++i)
    if (!call.passed_on(i) && results[i].toTensor().defined())
      fresh[i] = aliases.of(results[i].toTensor(), true);
  auto work = [op = call.op, stack, fresh] {
    op.callBoxed(stack.get());
    for (size_t i = 0; i < fresh.size(); ++i)
      if (fresh[i].defined()) fresh[i].copy_((*stack)[i].toTensor());
  };
  launch(stream_of(call.device), call.op.schema().name(), std::move(aliases.touches), work);
}

void run_at_once(Call& call, torch::jit::Stack& results) {
  const auto& schema = call.op.schema();
  Aliases aliases(c10::kCPU);
  auto stack = std::make_shared<torch::jit::Stack>(call.on(aliases, c10::kCPU));
  for (size_t i = 0; i < schema.arguments().size(); ++i)  // it decides itself how large they are
    if (schema.arguments()[i].is_out() && (*stack)[i].isTensor())
      (*stack)[i] = at::empty({0}, (*stack)[i].toTensor().options());
  {
    std::lock_guard lock(machine.mutex);
    machine.waited.insert(schema.name());
  }
  launch(stream_of(call.device), schema.name(), std::move(aliases.touches),
         [op = call.op, stack] { op.callBoxed(stack.get()); }, nullptr, true);
  results.clear();
  for (size_t i = 0; i < stack->size(); ++i) {
    auto land = [&](const Tensor& found) { return made(found, call.device).copy_(found); };
    if (!call.passed_on(i)) {
      results.push_back(mapped((*stack)[i], c10::Device(kType, call.device), land));
      continue;
    }
    IValue given = call.argument_of(i);
    if (given.isTensor() && schema.is_mutable() && (*stack)[i].isTensor()) {
      Tensor found = (*stack)[i].toTensor(), target = given.toTensor();
      if (target.sizes() != found.sizes()) target.resize_(found.sizes());
      target.copy_(found);
    }
    results.push_back(given);
  }
}

void operate(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView plain;
  auto taken = torch::jit::pop(*stack, op.schema().arguments().size());
  Call call{op, {taken.begin(), taken.end()}};
  call.check();
  c10::impl::VirtualGuardImpl guard(kType);
  auto before = guard.exchangeDevice(c10::Device(kType, call.device));
  torch::jit::Stack results;
  if (call.foretell(results)) launch_foretold(call, results);
  else run_at_once(call, results);
  guard.setDevice(before);
  for (IValue& result : results) stack->push_back(std::move(result));
}
