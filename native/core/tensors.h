// SPDX-License-Identifier: Apache-2.0
// The part of DLPack's exchange API and of Python's C API that reading tensors needs. Declared here,
// so that no header of Python or torch is needed to build the library.
#ifndef PORTAKV_TENSORS_H
#define PORTAKV_TENSORS_H

#include <cstddef>
#include <cstdint>

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

// --- Python -----------------------------------------------------------------------------------

using Object = void *;

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
  Object (*attribute)(Object, Object);
  int (*is_true)(Object);
  Object (*new_integer)(long long);
  long long (*integer)(Object);
  Object (*new_bool)(long);
  Object (*new_bytes)(const char *, ptrdiff_t);
  Object (*error)();  // borrowed; null: there is none
  void (*clear_error)();
  Object list_type;
  Object tuple_type;
  Object dict_type;
};

// Return the functions; null if the process has no interpreter.
const Python *python();

}  // namespace portakv

#endif
