// SPDX-License-Identifier: Apache-2.0
// Tensors of Python, and the part of DLPack's exchange API and of Python's C API that reading tensors needs. Declared here,
// so that no header of Python or torch is needed to build the library.
#ifndef PORTAKV_TENSORS_H
#define PORTAKV_TENSORS_H

#include <cstddef>
#include <cstdint>

#include "core.h"
#include "few.h"
#include "view.h"

namespace portakv {

// --- DLPack, version 1 ------------------------------------------------------------------------

struct DlVersion {
  uint32_t major;
  uint32_t minor;
};

struct DlDevice {
  int32_t type;
  int32_t id;
};

struct DlType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DlTensor {
  void *data;
  DlDevice device;
  int32_t ndim;
  DlType dtype;
  int64_t *shape;
  int64_t *strides;  // in elements
  uint64_t byte_offset;
};

struct DlExchange {
  DlVersion version;
  void *previous;
  void *allocate;
  void *managed_from_object;
  void *managed_to_object;
  // Describe a tensor without owning it: pointers are valid as long as the tensor is unchanged.
  int (*describe)(void *object, DlTensor *out);
};

enum DlDeviceType : int32_t {
  kDlCpu = 1,
  kDlCuda = 2,
  kDlCudaHost = 3,
  kDlRocm = 10,
  kDlRocmHost = 11,
  kDlExt = 12,  // torch's PrivateUse1
  kDlOneApi = 14
};

enum DlTypeCode : uint8_t { kDlInt = 0, kDlUInt = 1, kDlComplex = 5 };

constexpr bool is_host(int32_t type) {
  return type == kDlCpu || type == kDlCudaHost || type == kDlRocmHost;
}

// --- Python -----------------------------------------------------------------------------------

using Object = void *;

// PyMethodDef: how Python calls a function of the library. The function takes borrowed arguments, and
// returns a new reference, or null after it has set an error.
struct PythonFunction {
  const char *name;
  Object (*call)(Object self, const Object *arguments, ptrdiff_t count);
  int flags;
  const char *documentation;
};
constexpr int kFastCall = 0x0080;  // METH_FASTCALL

// Functions of the interpreter that loaded this library, all of them in every Python since 3.10.
struct Python {
  Object (*type)(Object);
  void (*retain)(Object);
  void (*release)(Object);
  ptrdiff_t (*list_size)(Object);
  Object (*list_item)(Object, ptrdiff_t);  // borrowed
  Object (*new_list)(ptrdiff_t);
  int (*set_list_item)(Object, ptrdiff_t, Object);  // takes the reference
  ptrdiff_t (*tuple_size)(Object);
  Object (*tuple_item)(Object, ptrdiff_t);  // borrowed
  Object (*new_tuple)(ptrdiff_t);
  int (*set_tuple_item)(Object, ptrdiff_t, Object);  // takes the reference
  ptrdiff_t (*dict_size)(Object);
  int (*dict_next)(Object, ptrdiff_t *, Object *, Object *);  // borrowed
  Object (*dict_item)(Object, Object);                        // borrowed
  Object (*call)(Object, const Object *, size_t, Object);     // PyObject_Vectorcall
  int (*is_true)(Object);
  Object (*new_integer)(long long);
  long long (*integer)(Object);
  Object (*new_bool)(long);
  Object (*new_bytes)(const char *, ptrdiff_t);
  Object (*error)();  // borrowed; null: there is none
  void (*clear_error)();
  Object (*new_function)(const PythonFunction *, Object self, Object module);
  void *(*leave)();       // PyEval_SaveThread
  void (*enter)(void *);  // PyEval_RestoreThread
  Object none;
  Object integer_type;
  Object list_type;
  Object tuple_type;
  Object dict_type;
};

// Return the functions; null if the process has no interpreter.
const Python *python();

// A tensor or container that the core does not read.
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

// Tell torch that a tensor was written.
void raise_version(const PortakvTorch &torch, void *handle);

// Asks single tensors of torch. Only the type of a tensor that `describe` took is known: the other
// questions read what lies in its object.
class Asker {
 public:
  Asker(const Python &python_, const PortakvTorch &torch_) : python(python_), torch(torch_) {}

  // Describe a tensor; throw `NotPlain` for another type than torch.Tensor or, if `parameters`,
  // torch.nn.Parameter, and for a tensor without memory: an empty one, or a transform's.
  DlTensor describe(Object tensor, bool parameters) const;
  // Return the elements from the first of a tensor's storage to its own first.
  int64_t storage_offset(Object tensor) const { return answer(torch.storage_offset, tensor); }
  // Return the bytes of a tensor's storage, which can have been resized.
  int64_t storage_bytes(Object tensor) const { return answer(torch.storage_bytes, tensor); }
  int64_t dtype(Object tensor) const { return answer(torch.dtype, tensor); }
  bool is_neg(Object tensor) const { return torch.is_neg(handle(tensor)); }
  bool is_conj(Object tensor) const { return torch.is_conj(handle(tensor)); }
  bool requires_grad(Object tensor) const {
    return torch.requires_grad(*static_cast<void *const *>(handle(tensor)));
  }
  bool is_pinned(Object tensor) const;
  void raise_version(Object tensor) const { portakv::raise_version(torch, handle(tensor)); }
  // Return an object; throw `Raised` for null.
  static Object raised(Object result);

  const Python &python;
  const PortakvTorch &torch;

 private:
  void *handle(Object tensor) const { return static_cast<char *>(tensor) + torch.handle_at; }

  template <typename Number>
  Number answer(int (*question)(void *, Number *), Object tensor) const {
    Number number = 0;
    if (question(handle(tensor), &number) != 0) throw NotPlain();
    return number;
  }
};

// Return true if memory is as it was. The caller holds the interpreter.
bool unchanged(const portakv_watch &watch);

// The address of a tensor's first byte.
inline int64_t begin_of(const DlTensor &facts) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(facts.data) + facts.byte_offset);
}

inline int64_t itemsize_of(const DlTensor &facts) {
  return (int64_t{facts.dtype.bits} * facts.dtype.lanes + 7) / 8;
}

// Reads the tensors of one view. Its functions throw `NotPlain`, `Raised`, and what `read_view`
// throws.
class TensorReader {
 public:
  TensorReader(const Python &python, const PortakvTorch &torch, const Bound &bound)
      : ask_(python, torch), bound_(bound) {}
  ~TensorReader();

  // Read a tensor, or plain tensors in containers as the layout names them.
  void read(Object tensors);
  // Read a tensor that was described.
  void read(Object tensor, const DlTensor &facts);
  // Return the answer of `portakv_view_read_tensors`: a new reference.
  Object answer() const;

  const View &view() const { return view_; }
  const Tensors &tensors() const { return tensors_; }
  const Few<Object, 40> &objects() const { return flat_; }
  const Asker &ask() const { return ask_; }
  DlDevice device() const { return device_; }
  bool requires_grad() const { return requires_grad_; }

 private:
  void walk(Object item, size_t level);
  ptrdiff_t enter(size_t level, ptrdiff_t length);
  void add(const DlTensor &facts);
  void ask_hidden(size_t n);
  void make_view();
  bool all_pinned() const;
  Object form_or_words() const;
  Object integer(int64_t value) const;

  const Asker ask_;
  const Bound &bound_;
  Few<Object, 40> flat_;  // references to the tensors in order
  Few<int64_t, 8> sizes_;
  Tensors tensors_;
  View view_;
  DlDevice device_ = {};
  bool on_host_ = false;
  bool is_complex_ = false;
  bool requires_grad_ = false;
};

}  // namespace portakv

#endif
