// SPDX-License-Identifier: Apache-2.0
// The contract of PortaKV's compiled core: every function that Python calls, with its rules.
//
// ABI        Plain C. Python loads the library by ctypes: by `PyDLL` where a function reads Python
//            objects, because the caller then holds the interpreter; by `CDLL` where it does not,
//            because ctypes then releases the interpreter. No header of Python, torch, CUDA or HIP
//            is needed to build it. Drivers come by `dlopen`.
// Units      Sizes, strides, offsets and addresses are bytes unless a comment says otherwise.
// Ownership  The caller owns every buffer that it passes, and the core keeps no pointer to it after
//            the call. What a function allocates, another function named here releases. Returned
//            strings are constants of the library.
// Errors     A function that can fail returns a code, 0 for success, and writes the values that the
//            error's sentence needs into a struct of the caller. No exception leaves the library.
// Threads    Any number of threads may call any function. State lives in objects that Python owns
//            and closes; only the functions of drivers are global.
#ifndef PORTAKV_CORE_H
#define PORTAKV_CORE_H

#include <stddef.h>
#include <stdint.h>

// Marks the functions that the library exports. Their names begin with `portakv_`: the linker hides
// every other symbol.
#if defined(_WIN32)
#define PORTAKV_API __declspec(dllexport)
#else
#define PORTAKV_API __attribute__((visibility("default")))
#endif

// The version of this header, which `portakv.core.library` compares with its own.
#define PORTAKV_CORE_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

// --- The library ------------------------------------------------------------------------------

// Return the hash of the sources that the library was built from, in hexadecimal digits.
PORTAKV_API const char *portakv_core_sources(void);

// Return PORTAKV_CORE_ABI of the header that the library was built with.
PORTAKV_API int portakv_core_abi(void);

// Check the machine and the build. Return 0, or the number of the first check that fails, from 1 on
// in the order of self_test.cpp.
PORTAKV_API int portakv_core_self_test(void);

// --- Views ------------------------------------------------------------------------------------

// Codes of the functions below.
enum {
  // The tensors contradict the layout or the declared extents.
  PORTAKV_VIEW_CONTRADICTION = -1,
  // The bytes of a slot of a packed view are not contiguous.
  PORTAKV_VIEW_SLOTS_APART = -2,
  // A number passes 64 bits, or memory for the answer is missing.
  PORTAKV_VIEW_PAST_64_BITS = -3,
  // `portakv_view_read_tensors` does not read such tensors or containers; `portakv_view_read` may.
  PORTAKV_VIEW_NOT_PLAIN = -4
};

// Read tensors that words describe. Return the number of words of the answer, or a code. The answer
// is whole if it is not longer than `capacity`.
//
// bound       a layout with its declared extents: the words of `Bound` in view.h
// sizes       the extent of each container level
// tensors     number of tensors, number of kinds, 1 if addresses follow; then for each tensor the
//             addresses of its first byte and of its storage, if they follow, and its kind; then for
//             each kind: bytes of an element, word of the dtype, dimensions, shape, strides in
//             elements
// place       the position in `PLACES` of portakv/view/form.py
// table_on_device  1 if a device alone knows the addresses
// alignment   the bytes that divide all addresses; 0: of the addresses that follow
// out         slots, the numbers of entries, of spans and of the form's words; then the tensors
//             that are entries, the first byte and the byte past the last of each span, and the
//             words of `View::form` in view.h
PORTAKV_API int64_t portakv_view_read(const int64_t *bound, const int64_t *sizes,
                                      const int64_t *tensors, int64_t place,
                                      int64_t table_on_device, int64_t alignment, int64_t *out,
                                      int64_t capacity);

// The objects of torch that `portakv_view_read_tensors` uses. Python owns them.
typedef struct {
  const void *exchange;  // torch.Tensor's DLPackExchangeAPI
  void *tensor;          // the types whose tensors are plain: torch.Tensor
  void *parameter;       // and torch.nn.Parameter
  void *storage_offset;  // unbound methods of torch.Tensor
  void *is_neg;
  void *is_conj;
  void *is_pinned;
  void *requires_grad;  // the names of attributes
  void *dtype;
  void *uint8;  // the dtypes of plain bytes
  void *int8;
  void *forms;  // a dictionary of forms by their words, as bytes
} PortakvTorch;

// Read a tensor, or plain tensors in lists, tuples and dicts as the layout names them. The caller
// holds the interpreter.
//
// Return a tuple: the form of these words, or the words of `View::form` as bytes if `forms` has no
// form or the view is packed; the addresses of the entries; the tensors at the entries; the spans,
// as a list of pairs; slots; True if a tensor requires grad. Return a code as an integer if the
// tensors cannot be read. Return NULL if a method of a tensor raised an error.
PORTAKV_API void *portakv_view_read_tensors(const int64_t *bound, void *tensors);

#ifdef __cplusplus
}
#endif

#endif
