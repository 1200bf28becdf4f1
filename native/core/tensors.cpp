// SPDX-License-Identifier: Apache-2.0
// Reads tensors of Python for a view. Every tensor is asked what DLPack hides; a tensor that is not
// plain ends the reading, and Python decides what it is.
#include "tensors.h"

#include <dlfcn.h>

#include "core.h"
#include "view.h"

namespace portakv {
namespace {

// A tensor or container that this file does not read.
struct NotPlain {};

// Python has an error that the caller raises.
struct Raised {};

// A reference to an object of Python.
class Owned {
 public:
  Owned(const Python &python, Object object) : python_(python), object_(object) {}
  ~Owned() {
    if (object_) python_.release(object_);
  }
  Owned(const Owned &) = delete;
  Owned &operator=(const Owned &) = delete;

  Object get() const { return object_; }
  Object hand_over() {
    const Object object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  const Python &python_;
  Object object_;
};

// Reads the tensors of one view.
class TensorReader {
 public:
  TensorReader(const Python &python, const PortakvTorch &torch, const Bound &bound)
      : python_(python),
        torch_(torch),
        bound_(bound),
        exchange_(static_cast<const DlExchange *>(torch.exchange)) {}

  ~TensorReader() {
    for (Object tensor : flat_) python_.release(tensor);
  }

  // Return the answer for Python: a new reference.
  Object read(Object tensors) {
    walk(tensors, 0);
    const size_t count = flat_.size();
    tensors_.begins.reserve(count);
    tensors_.bases.reserve(count);
    tensors_.kinds.reserve(count);
    for (size_t n = 0; n < count; n++) describe(n);
    for (Object tensor : flat_) ask(tensor);
    int64_t place = 0;  // the order of `PLACES` in portakv/view/form.py
    if (on_host_) place = all_pinned() ? 1 : 2;
    View view;
    read_view(bound_, sizes_.data(), tensors_, place, false, 0, view);
    return answer(view);
  }

 private:
  // --- Containers

  // Append the tensors in a container of the level, and check that its length is the level's.
  void walk(Object item, size_t level) {
    if (level == bound_.container_count) {
      python_.retain(item);
      flat_.push_back(item);
      return;
    }
    const Object type = python_.type(item);
    python_.release(type);  // the item holds it
    if (type == python_.list_type) {
      const ptrdiff_t length = enter(level, python_.list_size(item));
      for (ptrdiff_t n = 0; n < length; n++) walk(present(python_.list_item(item, n)), level + 1);
    } else if (type == python_.tuple_type) {
      const ptrdiff_t length = enter(level, python_.tuple_size(item));
      for (ptrdiff_t n = 0; n < length; n++) walk(present(python_.tuple_item(item, n)), level + 1);
    } else if (type == python_.dict_type) {
      enter(level, python_.dict_size(item));
      ptrdiff_t at = 0;
      Object key = nullptr;
      Object value = nullptr;
      while (python_.dict_next(item, &at, &key, &value)) walk(value, level + 1);
    } else {
      throw NotPlain();
    }
  }

  ptrdiff_t enter(size_t level, ptrdiff_t length) {
    if (length < 1) throw NotPlain();
    if (sizes_.size() == level) sizes_.push_back(length);
    if (sizes_[level] != length) throw NotPlain();
    return length;
  }

  Object present(Object item) {
    if (!item) throw Raised();  // another thread made the list shorter
    return item;
  }

  // --- Tensors

  // Read address, shape, strides, dtype and device of a tensor.
  void describe(size_t n) {
    const Object tensor = flat_[n];
    const Object type = python_.type(tensor);
    python_.release(type);  // the tensor holds it
    if (type != torch_.tensor && type != torch_.parameter) throw NotPlain();
    DlTensor facts;
    if (exchange_->describe(tensor, &facts) != 0) {
      python_.clear_error();
      throw NotPlain();
    }
    // No memory: an empty tensor, which has no address, or a transform's.
    if (!facts.data || facts.ndim < 0) throw NotPlain();
    if (n == 0) {
      device_ = facts.device;
      on_host_ = is_host(device_.type);
      if (!on_host_ && !is_known(device_.type)) throw NotPlain();
    }
    if (facts.device.type != device_.type || facts.device.id != device_.id) throw NotPlain();

    const int64_t dtype = dtype_word(facts.dtype.code, facts.dtype.bits, facts.dtype.lanes);
    const int64_t itemsize = (int64_t{facts.dtype.bits} * facts.dtype.lanes + 7) / 8;
    const bool is_integer = facts.dtype.code == kDlInt || facts.dtype.code == kDlUInt;
    if (is_integer && facts.dtype.bits == 8) check_bytes(tensor, facts.dtype.code == kDlUInt);
    is_complex_ |= facts.dtype.code == kDlComplex;
    const int64_t begin =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(facts.data) + facts.byte_offset);
    tensors_.begins.push_back(begin);
    tensors_.bases.push_back(itemsize);  // until `ask` knows the offset
    tensors_.kinds.push_back(tensors_.number_of(itemsize, dtype, static_cast<size_t>(facts.ndim),
                                                facts.shape, facts.strides));
  }

  static bool is_host(int32_t type) {
    return type == kDlCpu || type == kDlCudaHost || type == kDlRocmHost;
  }

  static bool is_known(int32_t type) {
    return type == kDlCuda || type == kDlRocm || type == kDlExt || type == kDlOneApi;
  }

  // Check that integers of 8 bits are bytes: DLPack describes int1 to int7 as if they were.
  void check_bytes(Object tensor, bool is_unsigned) {
    const Owned dtype(python_, raised(python_.attribute(tensor, torch_.dtype)));
    if (dtype.get() != (is_unsigned ? torch_.uint8 : torch_.int8)) throw NotPlain();
  }

  // Ask a tensor what DLPack hides.
  void ask(Object tensor) {
    const size_t n = asked_++;
    const Owned answer(python_, method(torch_.storage_offset, tensor));
    const long long offset = python_.integer(answer.get());
    if (offset == -1 && python_.error()) throw Raised();
    tensors_.bases[n] = tensors_.begins[n] - tensors_.bases[n] * offset;
    if (holds(torch_.is_neg, tensor)) throw NotPlain();
    if (is_complex_ && holds(torch_.is_conj, tensor)) throw NotPlain();
    if (!requires_grad_) {
      const Owned grad(python_, raised(python_.attribute(tensor, torch_.requires_grad)));
      requires_grad_ = truth(grad.get());
    }
  }

  // Return true if all tensors are pinned, which is a fact of their storages.
  bool all_pinned() {
    for (size_t n = 0; n < flat_.size(); n++) {
      if (n && tensors_.bases[n] == tensors_.bases[n - 1]) continue;
      if (!holds(torch_.is_pinned, flat_[n])) return false;
    }
    return true;
  }

  Object method(Object unbound, Object tensor) {
    return raised(python_.call(unbound, &tensor, 1, nullptr));
  }

  bool holds(Object unbound, Object tensor) {
    const Owned answer(python_, method(unbound, tensor));
    return truth(answer.get());
  }

  bool truth(Object answer) {
    const int result = python_.is_true(answer);
    if (result < 0) throw Raised();
    return result == 1;
  }

  Object raised(Object result) {
    if (!result) throw Raised();
    return result;
  }

  // --- The answer

  Object answer(const View &view) {
    const ptrdiff_t entries = static_cast<ptrdiff_t>(view.entries.size());
    const ptrdiff_t spans = static_cast<ptrdiff_t>(view.spans.size());
    Owned origins(python_, raised(python_.new_tuple(entries)));
    Owned owners(python_, raised(python_.new_tuple(entries)));
    for (ptrdiff_t at = 0; at < entries; at++) {
      const size_t n = static_cast<size_t>(view.entries[static_cast<size_t>(at)]);
      python_.set_tuple_item(origins.get(), at, integer(tensors_.begins[n]));
      python_.retain(flat_[n]);
      python_.set_tuple_item(owners.get(), at, flat_[n]);
    }
    Owned ranges(python_, raised(python_.new_list(spans)));
    for (ptrdiff_t at = 0; at < spans; at++) {
      const Span &span = view.spans[static_cast<size_t>(at)];
      Owned range(python_, raised(python_.new_tuple(2)));
      python_.set_tuple_item(range.get(), 0, integer(span.first));
      python_.set_tuple_item(range.get(), 1, integer(span.past));
      python_.set_list_item(ranges.get(), at, range.hand_over());
    }
    Owned result(python_, raised(python_.new_tuple(6)));
    python_.set_tuple_item(result.get(), 0, form_or_words(view));
    python_.set_tuple_item(result.get(), 1, origins.hand_over());
    python_.set_tuple_item(result.get(), 2, owners.hand_over());
    python_.set_tuple_item(result.get(), 3, ranges.hand_over());
    python_.set_tuple_item(result.get(), 4, integer(view.slots));
    python_.set_tuple_item(result.get(), 5, raised(python_.new_bool(requires_grad_)));
    return result.hand_over();
  }

  Object form_or_words(const View &view) {
    const char *words = reinterpret_cast<const char *>(view.form.data());
    const ptrdiff_t nbytes = static_cast<ptrdiff_t>(view.form.size() * sizeof(int64_t));
    Owned key(python_, raised(python_.new_bytes(words, nbytes)));
    // A packed form and a form of opaque pages may have the same words.
    if (bound_.packed) return key.hand_over();
    const Object form = python_.dict_item(torch_.forms, key.get());
    if (!form) return key.hand_over();
    python_.retain(form);
    return form;
  }

  Object integer(int64_t value) { return raised(python_.new_integer(value)); }

  const Python &python_;
  const PortakvTorch &torch_;
  const Bound &bound_;
  const DlExchange *exchange_;
  Few<Object, 40> flat_;  // references to the tensors in order
  Few<int64_t, 8> sizes_;
  Tensors tensors_;
  DlDevice device_ = {};
  bool on_host_ = false;
  bool is_complex_ = false;
  bool requires_grad_ = false;
  size_t asked_ = 0;
};

template <typename Pointer>
bool look_up(const char *name, Pointer &out) {
  out = reinterpret_cast<Pointer>(dlsym(RTLD_DEFAULT, name));
  return out != nullptr;
}

bool look_up_all(Python &out) {
  return look_up("PyObject_Type", out.type) && look_up("Py_IncRef", out.retain) &&
         look_up("Py_DecRef", out.release) && look_up("PyList_Size", out.list_size) &&
         look_up("PyList_GetItem", out.list_item) && look_up("PyList_New", out.new_list) &&
         look_up("PyList_SetItem", out.set_list_item) && look_up("PyTuple_Size", out.tuple_size) &&
         look_up("PyTuple_GetItem", out.tuple_item) && look_up("PyTuple_New", out.new_tuple) &&
         look_up("PyTuple_SetItem", out.set_tuple_item) && look_up("PyDict_Size", out.dict_size) &&
         look_up("PyDict_Next", out.dict_next) &&
         look_up("PyDict_GetItemWithError", out.dict_item) &&
         look_up("PyBool_FromLong", out.new_bool) && look_up("PyObject_Vectorcall", out.call) &&
         look_up("PyObject_GetAttr", out.attribute) && look_up("PyObject_IsTrue", out.is_true) &&
         look_up("PyLong_FromLongLong", out.new_integer) &&
         look_up("PyLong_AsLongLong", out.integer) &&
         look_up("PyBytes_FromStringAndSize", out.new_bytes) &&
         look_up("PyErr_Occurred", out.error) && look_up("PyErr_Clear", out.clear_error) &&
         look_up("PyList_Type", out.list_type) && look_up("PyTuple_Type", out.tuple_type) &&
         look_up("PyDict_Type", out.dict_type);
}

}  // namespace

const Python *python() {
  static Python functions;
  static const bool complete = look_up_all(functions);
  return complete ? &functions : nullptr;
}

}  // namespace portakv

using namespace portakv;

void *portakv_view_read_tensors(const int64_t *bound, void *tensors) {
  const Python *functions = python();
  if (!functions) return nullptr;
  int64_t code = 0;
  try {
    const Bound layout(bound);
    const PortakvTorch &torch = *static_cast<const PortakvTorch *>(layout.torch);
    return TensorReader(*functions, torch, layout).read(tensors);
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
