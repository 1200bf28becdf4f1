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

// Codes of more than one subject.
#define PORTAKV_MALFORMED (-1)  // words that describe nothing that the core can work with

// --- The library ------------------------------------------------------------------------------

// Return the hash of the sources that the library was built from, in hexadecimal digits.
PORTAKV_API const char *portakv_core_sources(void);

// Return PORTAKV_CORE_ABI of the header that the library was built with.
PORTAKV_API int portakv_core_abi(void);

// --- Kernels that copy rows -------------------------------------------------------------------

// Codes below 0; those above 0 are the driver's.
#define PORTAKV_ROWS_TOO_MANY_LOOPS (-20)  // the argument of the kernels does not hold a nest
#define PORTAKV_ROWS_TOO_MANY_UNITS (-21)  // the kernels count the units of a view in 32 bits

// The launches of a plan by its kernels, with all values that no call changes. Any number of threads
// may use one.
typedef struct portakv_rows portakv_rows;

// What a call says of one side.
typedef struct portakv_rows_side {
  const int64_t *addresses;  // of the view, in memory of the host; none is read of a `table` alone
  int64_t table;             // where a device reads those addresses; 0: it need not
  int64_t ids;               // where the kernel reads ids; 0: consecutive tokens
  int64_t wide;              // the ids are int64, else int32
  int64_t offset;            // tokens that are passed over
  int64_t slots;             // tokens of the view
} portakv_rows_side;

// Write the words of one nest of a plan as a kernel: `RowsShape` of rows.h has their order, and
// `RowsOptions` that of `options`. Return their number, which may exceed the capacity;
// PORTAKV_ROWS_TOO_MANY_LOOPS with detail = loops of the nest, planes; or PORTAKV_MALFORMED.
PORTAKV_API int64_t portakv_rows_describe(const int64_t *plan, int64_t nest,
                                          const int64_t *options, int64_t *out, int64_t capacity,
                                          int64_t *detail);

// Return the launches of a plan; null if its words are malformed or memory is short. The caller
// closes it.
//
// cuts       For each nest: threads of a block, the most units of a launch, 0; or 1 and, of a copy
//            by a few blocks that stay, the bytes up to which it is small, the most blocks of a
//            small and of a large one, the vectors of a block's turn, the vectors of a unit in a
//            group of planes, the groups; then a count of tunings and for each the least bytes of a
//            copy, the vectors of a thread, the bytes to prefetch ahead.
// functions  For each nest two of the driver's handles, by the vectors that a thread moves.
// launch     cuLaunchKernel, or a function of another driver with its arguments.
PORTAKV_API portakv_rows *portakv_rows_open(const int64_t *plan, const int64_t *options,
                                            const int64_t *cuts, const int64_t *functions,
                                            void *launch);

PORTAKV_API void portakv_rows_close(portakv_rows *rows);

// Order a copy of `count` tokens, whole units, on a stream of the current device. `status` is the
// device's address of the word for the first bad id; 0: none. Return 0, the driver's error, or
// PORTAKV_ROWS_TOO_MANY_UNITS. Launches before the one that failed stay ordered.
PORTAKV_API int portakv_rows_run(const portakv_rows *rows, const portakv_rows_side *src,
                                 const portakv_rows_side *dst, int64_t count, uint64_t status,
                                 void *stream);

#ifdef __cplusplus
}
#endif

#endif
