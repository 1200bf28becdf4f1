// SPDX-License-Identifier: Apache-2.0
// Torch's operators as jobs.
//
// An operator's results get their shapes from torch's Meta kernel when it is launched, and their
// bytes from the CPU's kernel when the job runs. Where shapes depend on values the launch waits.
#pragma once

#include "memory.h"

#include <torch/library.h>

namespace {

using at::Tensor;
using c10::IValue;

// --- a job's view of a tensor --------------------------------------------------------------------

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
    BlockPtr block = device_.is_meta() ? nullptr : find(tensor.storage().data());
    if (block) note(touches, block, writes);
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
      auto nothing = none->allocate(bytes);
      return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(nothing), none, true);
    }
    if (BlockPtr block = find(at)) at = block->alias + (static_cast<char*>(at) - block->address);
    return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(at, c10::kCPU));
  }
};

bool pinned(const Tensor& tensor) {
  BlockPtr block = find(tensor.storage().data());
  return block && block->device == kHost;
}

void copy_on(const Stream& stream, const Tensor& to, const Tensor& from, bool waits) {
  Aliases aliases(c10::kCPU);
  auto target = aliases.of(to, true);
  bool pageable = from.is_cpu() && !pinned(from);
  auto source = pageable ? from : aliases.of(from, false);
  auto work = [target, source] { target.copy_(source); };
  launch(stream, "a copy", std::move(aliases.touches), work, waits);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView plain;
  if (to.numel() == 0) return to;
  bool here = to.device().type() == kType, there = from.device().type() == kType;
  Stream stream = stream_of(there ? from.device().index() : to.device().index());
  if (!there) {
    // Pageable memory is read now, because its owner may change it; pinned memory by the job.
    copy_on(stream, to, pinned(from) || !non_blocking ? from : from.clone(), !non_blocking);
  } else if (!here) {
    bool later = non_blocking && pinned(to);
    copy_on(stream, to, from, !later);
    if (!later) raise_faults();
  } else if (from.device() == to.device()) {
    copy_on(stream, to, from, false);
  } else {
    Stream other = stream_of(to.device().index());
    fence(stream, mark(other));
    copy_on(stream, to, from, false);
    fence(other, mark(stream));
  }
  return to;
}

// --- any operator --------------------------------------------------------------------------------

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

  size_t argument_of(size_t result) const {  // the argument that a result aliases
    const auto& schema = op.schema();
    for (size_t i = 0; i < arguments.size(); ++i)
      if (schema.arguments()[i].alias_info() &&
          *schema.arguments()[i].alias_info() == *schema.returns()[result].alias_info())
        return i;
    TORCH_CHECK(false, "simdev: ", schema.name(), " returns an alias of none of its arguments.");
  }

  void check() {
    auto name = op.schema().name();
    bool indexes = name == "aten::index" || name.rfind("aten::index_put", 0) == 0 ||
                   name == "aten::_index_put_impl_";
    auto look = [&](const Tensor& tensor) {
      if (tensor.device().type() == kType) {
        int on = tensor.device().index();
        TORCH_CHECK(device < 0 || device == on, "Expected all tensors to be on the same device, "
                    "but found some on simulated devices ", device, " and ", on, " (", name, ").");
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

  // The results of the Meta kernel; false if shapes depend on values, or if Meta has no kernel.
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
    Tensor expected = results[i].toTensor();
    if (!call.passed_on(i)) {
      if (expected.defined()) results[i] = made(expected, call.device);
      continue;
    }
    Tensor given = call.arguments[call.argument_of(i)].toTensor();
    if (given.sizes() != expected.sizes()) given.resize_(expected.sizes());
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
  for (size_t i = 0; i < schema.arguments().size(); ++i)  // the operator decides their sizes
    if (schema.arguments()[i].is_out() && (*stack)[i].isTensor())
      (*stack)[i] = at::empty({0}, (*stack)[i].toTensor().options());
  {
    std::lock_guard lock(machine.mutex);
    machine.waited.insert(schema.name());
  }
  launch(stream_of(call.device), schema.name(), std::move(aliases.touches),
         [op = call.op, stack] { op.callBoxed(stack.get()); }, true);
  results.clear();
  for (size_t i = 0; i < stack->size(); ++i) {
    auto land = [&](const Tensor& found) { return made(found, call.device).copy_(found); };
    if (!call.passed_on(i)) {
      results.push_back(mapped((*stack)[i], c10::Device(kType, call.device), land));
      continue;
    }
    size_t at = call.argument_of(i);
    if (schema.arguments()[at].is_out() && (*stack)[i].isTensor()) {
      Tensor found = (*stack)[i].toTensor(), target = call.arguments[at].toTensor();
      if (target.sizes() != found.sizes()) target.resize_(found.sizes());
      target.copy_(found);
    }
    results.push_back(call.arguments[at]);
  }
}

void operate(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView plain;
  auto taken = torch::jit::pop(*stack, op.schema().arguments().size());
  Call call{op, {taken.begin(), taken.end()}};
  call.check();
  c10::DeviceGuard guard(c10::Device(kType, call.device));
  torch::jit::Stack results;
  if (call.foretell(results)) launch_foretold(call, results);
  else run_at_once(call, results);
  for (IValue& result : results) stack->push_back(std::move(result));
}

}  // namespace
