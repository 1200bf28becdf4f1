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

// --- Ids --------------------------------------------------------------------------------------
//
// Position p of one side of a copy, with q = p + offset, is slot ids[q / step] * step + q % step.
// A negative id skips its positions. Each call is one struct, since ctypes passes one pointer in a
// tenth of the time of ten numbers. The calls are short: they hold the interpreter.

// A list of ids in host memory, and the positions of it that one side of a copy uses.
typedef struct portakv_ids {
  const void *data;  // the first id; any alignment
  int64_t width;     // bytes of an id: 4 or 8, signed
  int64_t stride;    // from one id to the next one; may be negative
  int64_t length;    // ids
  int64_t step;      // tokens of an id
  int64_t offset;    // tokens of the first ids that are passed over
  int64_t count;     // positions
} portakv_ids;

// Codes of `portakv_ids_*`.
enum {
  PORTAKV_IDS_CLEAN = 0,     // every id names slots of the view
  PORTAKV_IDS_NEGATIVE = 1,  // the same, but for negative ids
  PORTAKV_IDS_PAST = -1,     // a slot lies past the end of the view
  PORTAKV_IDS_TWICE = -2,    // a slot occurs twice
  PORTAKV_IDS_OTHER = -3,    // a list that is not one of Python's integers of at most 64 bits
  PORTAKV_IDS_MEMORY = -4,   // out of memory
};

// What is wrong with ids. A place is an id's in the list, -1 for none.
typedef struct portakv_ids_fault {
  int64_t position;     // PAST: the first position whose slot is past the end
  int64_t slot;         // that slot; TWICE: the smallest slot that occurs twice
  int64_t id;           // PAST: the id of that slot
  int64_t times;        // TWICE: how often the slot occurs
  int64_t past_place;   // the first id of which any slot is past the end, used or not
  int64_t past_id;
  int64_t first_place;  // TWICE: the first id that occurs again, its first place
  int64_t again_place;  // and its second place
  int64_t again_id;
} portakv_ids_fault;

typedef struct portakv_ids_check_call {
  portakv_ids ids;
  int64_t slots;             // of the view
  int64_t distinct;          // other than 0: no slot may occur twice
  portakv_ids_fault *fault;  // written with PAST and TWICE; may be NULL
} portakv_ids_check_call;

// Check the ids that the positions use. A slot past the end is found before one that occurs twice.
PORTAKV_API int portakv_ids_check(const portakv_ids_check_call *call);

// Read a Python list of integers. The caller holds the interpreter. Return 0, or OTHER for a list
// of another length, or with an item of another type than int or of more than 64 bits.
PORTAKV_API int portakv_ids_read_list(void *list, int64_t *out, int64_t length);

typedef struct portakv_ids_slots_call {
  portakv_ids ids;
  int64_t every;
  int64_t *out;  // [(count + every - 1) / every]
} portakv_ids_slots_call;

// Write the slot of each `every`-th position: -1 where the id is negative, 2^62 or the last before
// it for an id past that. Return how many slots the ids cover.
PORTAKV_API int64_t portakv_ids_slots(const portakv_ids_slots_call *call);

typedef struct portakv_ids_units_call {
  portakv_ids ids;  // its offset and its count are whole units
  int64_t unit;     // tokens; divides the step
  int64_t *out;     // [count / unit]
} portakv_ids_units_call;

// Write slot / unit of each unit of tokens: any negative number where the id is negative. Return
// how many units the ids cover.
PORTAKV_API int64_t portakv_ids_units(const portakv_ids_units_call *call);

typedef struct portakv_ids_last_call {
  portakv_ids ids;  // its positions do not matter
  int64_t *out;     // [length]; NULL: write nothing
} portakv_ids_last_call;

// Write all ids, with -1 in place of each id of 0 or more that a later one equals. Return how many
// those are, or MEMORY.
PORTAKV_API int64_t portakv_ids_last(const portakv_ids_last_call *call);

#ifdef __cplusplus
}
#endif

#endif
