// SPDX-License-Identifier: Apache-2.0
// Reads tensors of Python for a view. Every tensor is asked what DLPack hides; a tensor that is not
// plain ends the reading, and Python decides what it is.
#include "tensors.h"

#include <dlfcn.h>

namespace portakv {
namespace {

bool is_known_device(int32_t type) {
  return type == kDlCuda || type == kDlRocm || type == kDlExt || type == kDlOneApi;
}

}  // namespace

// --- One tensor -------------------------------------------------------------------------------

Object Asker::raised(Object result) {
  if (!result) throw Raised();
  return result;
}

void raise_version(const PortakvTorch &torch, void *handle) {
  try {
    if (!torch.is_inference(handle)) torch.raise_version(handle);
  } catch (...) {
    // Torch does not count the versions of this tensor. The copy was launched.
  }
}

bool Asker::is_pinned(Object tensor) const {
  const Owned pinned(python, raised(python.call(torch.is_pinned, &tensor, 1, nullptr)));
  const int result = python.is_true(pinned.get());
  if (result < 0) throw Raised();
  return result == 1;
}

DlTensor Asker::describe(Object tensor, bool parameters) const {
  const Object type = python.type(tensor);
  python.release(type);  // the tensor holds it
  if (type != torch.tensor && !(parameters && type == torch.parameter)) throw NotPlain();
  DlTensor facts;
  if (static_cast<const DlExchange *>(torch.exchange)->describe(tensor, &facts) != 0) {
    python.clear_error();
    throw NotPlain();
  }
  if (!facts.data || facts.ndim < 0) throw NotPlain();
  return facts;
}

// Handles of tensors answer in a few nanoseconds each: no call passes through Python.
bool unchanged(const portakv_watch &watch) {
  for (int64_t n = 0; n < watch.count; n++) {
    void *address = nullptr;
    if (watch.address_of(watch.tensors[n], &address) != 0) return false;
    if (reinterpret_cast<intptr_t>(address) != watch.addresses[n]) return false;
  }
  // A storage that moved more than once can be at its first address again, with fewer bytes.
  for (int64_t n = 0; n < watch.storage_count; n++) {
    int64_t nbytes = 0;
    if (watch.storage_bytes(watch.storages[n], &nbytes) != 0) return false;
    if (nbytes != watch.sizes[n]) return false;
  }
  return true;
}

// --- The tensors of a view --------------------------------------------------------------------

TensorReader::~TensorReader() {
  for (Object tensor : flat_) ask_.python.release(tensor);
}

void TensorReader::read(Object tensors) {
  walk(tensors, 0);
  const size_t count = flat_.size();
  tensors_.begins.reserve(count);
  tensors_.bases.reserve(count);
  tensors_.kinds.reserve(count);
  for (size_t n = 0; n < count; n++) add(ask_.describe(flat_[n], true));
  make_view();
}

void TensorReader::read(Object tensor, const DlTensor &facts) {
  if (bound_.container_count != 0) throw NotPlain();
  ask_.python.retain(tensor);
  flat_.push_back(tensor);
  add(facts);
  make_view();
}

void TensorReader::make_view() {
  for (size_t n = 0; n < flat_.size(); n++) ask_hidden(n);
  int64_t place = 0;  // the order of `PLACES` in portakv/view/form.py
  if (on_host_) place = all_pinned() ? 1 : 2;
  read_view(bound_, sizes_.data(), tensors_, place, false, 0, view_);
}

// Append the tensors in a container of the level, and check that its length is the level's.
void TensorReader::walk(Object item, size_t level) {
  const Python &python = ask_.python;
  if (level == bound_.container_count) {
    python.retain(item);
    flat_.push_back(item);
    return;
  }
  const auto present = [](Object each) {
    return Asker::raised(each);  // null: another thread made the list shorter
  };
  const Object type = python.type(item);
  python.release(type);  // the item holds it
  if (type == python.list_type) {
    const ptrdiff_t length = enter(level, python.list_size(item));
    for (ptrdiff_t n = 0; n < length; n++) walk(present(python.list_item(item, n)), level + 1);
  } else if (type == python.tuple_type) {
    const ptrdiff_t length = enter(level, python.tuple_size(item));
    for (ptrdiff_t n = 0; n < length; n++) walk(present(python.tuple_item(item, n)), level + 1);
  } else if (type == python.dict_type) {
    enter(level, python.dict_size(item));
    ptrdiff_t at = 0;
    Object key = nullptr;
    Object value = nullptr;
    while (python.dict_next(item, &at, &key, &value)) walk(value, level + 1);
  } else {
    throw NotPlain();
  }
}

ptrdiff_t TensorReader::enter(size_t level, ptrdiff_t length) {
  if (length < 1) throw NotPlain();
  if (sizes_.size() == level) sizes_.push_back(length);
  if (sizes_[level] != length) throw NotPlain();
  return length;
}

// Add address, shape, strides, dtype and device of the next tensor.
void TensorReader::add(const DlTensor &facts) {
  if (tensors_.begins.empty()) {
    device_ = facts.device;
    on_host_ = is_host(device_.type);
    if (!on_host_ && !is_known_device(device_.type)) throw NotPlain();
  }
  if (facts.device.type != device_.type || facts.device.id != device_.id) throw NotPlain();

  const int64_t dtype = dtype_word(facts.dtype.code, facts.dtype.bits, facts.dtype.lanes);
  const int64_t itemsize = itemsize_of(facts);
  is_complex_ |= facts.dtype.code == kDlComplex;
  tensors_.begins.push_back(begin_of(facts));
  tensors_.bases.push_back(itemsize);  // until `ask_hidden` knows the offset
  tensors_.kinds.push_back(tensors_.number_of(itemsize, dtype, static_cast<size_t>(facts.ndim),
                                              facts.shape, facts.strides));
}

// Ask a tensor what DLPack hides.
void TensorReader::ask_hidden(size_t n) {
  const Object tensor = flat_[n];
  // DLPack describes int1 to int7 as if they were bytes.
  const int64_t dtype = tensors_.kind[tensors_.kinds[n]].dtype;
  if (dtype == dtype_word(kDlUInt, 8, 1) && ask_.dtype(tensor) != ask_.torch.uint8) {
    throw NotPlain();
  }
  if (dtype == dtype_word(kDlInt, 8, 1) && ask_.dtype(tensor) != ask_.torch.int8) throw NotPlain();
  tensors_.bases[n] = tensors_.begins[n] - tensors_.bases[n] * ask_.storage_offset(tensor);
  if (ask_.is_neg(tensor)) throw NotPlain();
  if (is_complex_ && ask_.is_conj(tensor)) throw NotPlain();
  requires_grad_ = requires_grad_ || ask_.requires_grad(tensor);
}

// Return true if all tensors are pinned, which is a fact of their storages.
bool TensorReader::all_pinned() const {
  for (size_t n = 0; n < flat_.size(); n++) {
    if (n && tensors_.bases[n] == tensors_.bases[n - 1]) continue;
    if (!ask_.is_pinned(flat_[n])) return false;
  }
  return true;
}

// --- The answer -------------------------------------------------------------------------------

Object TensorReader::answer() const {
  const Python &python = ask_.python;
  const ptrdiff_t entries = static_cast<ptrdiff_t>(view_.entries.size());
  const ptrdiff_t spans = static_cast<ptrdiff_t>(view_.spans.size());
  Owned origins(python, Asker::raised(python.new_tuple(entries)));
  Owned owners(python, Asker::raised(python.new_tuple(entries)));
  for (ptrdiff_t at = 0; at < entries; at++) {
    const size_t n = static_cast<size_t>(view_.entries[static_cast<size_t>(at)]);
    python.set_tuple_item(origins.get(), at, integer(tensors_.begins[n]));
    python.retain(flat_[n]);
    python.set_tuple_item(owners.get(), at, flat_[n]);
  }
  Owned ranges(python, Asker::raised(python.new_list(spans)));
  for (ptrdiff_t at = 0; at < spans; at++) {
    const Span &span = view_.spans[static_cast<size_t>(at)];
    Owned range(python, Asker::raised(python.new_tuple(2)));
    python.set_tuple_item(range.get(), 0, integer(span.first));
    python.set_tuple_item(range.get(), 1, integer(span.past));
    python.set_list_item(ranges.get(), at, range.hand_over());
  }
  Owned result(python, Asker::raised(python.new_tuple(6)));
  python.set_tuple_item(result.get(), 0, form_or_words());
  python.set_tuple_item(result.get(), 1, origins.hand_over());
  python.set_tuple_item(result.get(), 2, owners.hand_over());
  python.set_tuple_item(result.get(), 3, ranges.hand_over());
  python.set_tuple_item(result.get(), 4, integer(view_.slots));
  python.set_tuple_item(result.get(), 5, Asker::raised(python.new_bool(requires_grad_)));
  return result.hand_over();
}

Object TensorReader::form_or_words() const {
  const Python &python = ask_.python;
  const char *words = reinterpret_cast<const char *>(view_.form.data());
  const ptrdiff_t nbytes = static_cast<ptrdiff_t>(view_.form.size() * sizeof(int64_t));
  Owned key(python, Asker::raised(python.new_bytes(words, nbytes)));
  // A packed form and a form of opaque pages may have the same words.
  if (bound_.packed) return key.hand_over();
  const Object form = python.dict_item(ask_.torch.forms, key.get());
  if (!form) return key.hand_over();
  python.retain(form);
  return form;
}

Object TensorReader::integer(int64_t value) const {
  return Asker::raised(ask_.python.new_integer(value));
}

// --- Python -----------------------------------------------------------------------------------

namespace {

template <typename Pointer>
bool look_up(const char *name, Pointer &out) {
  out = reinterpret_cast<Pointer>(dlsym(RTLD_DEFAULT, name));
  return out != nullptr;
}

// Python 3.10 exports the second one alone, which is the same for calls without keywords.
bool look_up_call(Python &out) {
  return look_up("PyObject_Vectorcall", out.call) || look_up("PyObject_VectorcallDict", out.call);
}

bool look_up_all(Python &out) {
  return look_up("PyObject_Type", out.type) && look_up("Py_IncRef", out.retain) &&
         look_up("Py_DecRef", out.release) && look_up("PyList_Size", out.list_size) &&
         look_up("PyList_GetItem", out.list_item) && look_up("PyList_New", out.new_list) &&
         look_up("PyList_SetItem", out.set_list_item) && look_up("PyTuple_Size", out.tuple_size) &&
         look_up("PyTuple_GetItem", out.tuple_item) && look_up("PyTuple_New", out.new_tuple) &&
         look_up("PyTuple_SetItem", out.set_tuple_item) &&
         look_up("PyDict_Size", out.dict_size) &&
         look_up("PyDict_Next", out.dict_next) &&
         look_up("PyDict_GetItemWithError", out.dict_item) &&
         look_up("PyBool_FromLong", out.new_bool) && look_up_call(out) &&
         look_up("PyObject_IsTrue", out.is_true) &&
         look_up("PyLong_FromLongLong", out.new_integer) &&
         look_up("PyLong_AsLongLong", out.integer) &&
         look_up("PyBytes_FromStringAndSize", out.new_bytes) &&
         look_up("PyErr_Occurred", out.error) && look_up("PyErr_Clear", out.clear_error) &&
         look_up("PyCFunction_NewEx", out.new_function) &&
         look_up("PyEval_SaveThread", out.leave) && look_up("PyEval_RestoreThread", out.enter) &&
         look_up("_Py_NoneStruct", out.none) && look_up("PyLong_Type", out.integer_type) && look_up("PyList_Type", out.list_type) &&
         look_up("PyTuple_Type", out.tuple_type) && look_up("PyDict_Type", out.dict_type);
}

}  // namespace

const Python *python() {
  static Python functions;
  static const bool complete = look_up_all(functions);
  return complete ? &functions : nullptr;
}

}  // namespace portakv

using namespace portakv;

int portakv_python_found() { return python() != nullptr; }

void *portakv_view_read_tensors(const int64_t *bound, void *tensors) {
  const Python *functions = python();
  if (!functions) return nullptr;
  int64_t code = 0;
  try {
    const Bound layout(bound);
    const PortakvTorch &torch = *static_cast<const PortakvTorch *>(layout.torch);
    TensorReader reader(*functions, torch, layout);
    reader.read(tensors);
    return reader.answer();
  } catch (const Raised &) {
    return nullptr;
  } catch (const NotPlain &) {
    code = PORTAKV_VIEW_NOT_PLAIN;
  } catch (const Contradiction &) {
    code = PORTAKV_VIEW_CONTRADICTION;
  } catch (const SlotsApart &) {
    code = PORTAKV_VIEW_SLOTS_APART;
  } catch (const std::exception &) {
    code = PORTAKV_VIEW_PAST_64_BITS;
  }
  return functions->new_integer(code);
}
