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

// --- Plans ------------------------------------------------------------------------------------

// Codes of the functions below. The values of a refusal's sentence are in `out`.
enum {
  PORTAKV_MALFORMED = -1,           // the words are not those of forms, or products pass 64 bits
  PORTAKV_NO_MEMORY = -2,           // an allocation failed
  PORTAKV_PLAN_UNLIKE = -10,        // the forms differ in kv, layers, heads, widths or pages
  PORTAKV_PLAN_UNIT = -11,          // the unit does not divide the largest unit, which is the value
  PORTAKV_PLAN_PAGES = -12,         // no unit holds whole opaque pages
  PORTAKV_PLAN_NO_FACTOR = -13,     // tokens moved together, tokens of a block
  PORTAKV_PLAN_NO_REFINEMENT = -14  // axis, counts of steps of both sides, then their extents
};

// The words that `out` has room for at least, so that the values of every refusal fit.
#define PORTAKV_PLAN_LEAST 128

// Plan a copy between two forms, and write the words of the plan to `out`.
//
// src, dst            words of the forms (form.h)
// src_step, dst_step  tokens for each id of that side; 0 for a side without ids
// unit                tokens moved together; 0 for the most that both sides allow
// Return the words of the plan, more than `capacity` if `out` is too small; or a code.
PORTAKV_API int64_t portakv_plan_make(const int64_t *src, const int64_t *dst, int64_t src_step,
                                      int64_t dst_step, int64_t unit, int64_t *out,
                                      int64_t capacity);

// Plan a copy that packs the blocks of one form into those of another, or unpacks them.
//
// raw, packed   words of the forms
// packs         1 from raw to packed, 0 from packed to raw
// equal_planes  1 if the packed planes of all kv have one geometry
// Write a count of nests and the nests (PackNest in plan.h) to `out`; return as above.
PORTAKV_API int64_t portakv_plan_pack(const int64_t *raw, const int64_t *packed, int packs,
                                      int equal_planes, int64_t *out, int64_t capacity);

// --- Runs and pieces --------------------------------------------------------------------------
//
// A copy is words: the memory and the positions of the source and of the destination, then the
// number of positions. A side's words are
//   addresses   a pointer to the table of addresses; the address itself if the table has one entry
//   entries     of the table
//   ids         a pointer to ids; negative ids skip their positions
//   id_bytes    8 or 4; 0: no ids, position p is slot p + offset
//   number      of ids
//   step        tokens of an id
//   offset      tokens that are passed over before the first position
//   slots       tokens of the view
// `plan` is the words of a plan (plan.h). Functions that list write columns of `room` words each,
// and return the number of rows that there are: if that is more than `room`, call again with more.

enum {
  PORTAKV_RUNS_OUTSIDE = -20,  // a position past its list of ids, or past its view
  PORTAKV_RUNS_EDGES = -21     // call again with the edges of allocations
};

// List the runs of a copy: source, destination, bytes. They are in the order of the source, equal
// sources in the order of the destination, and neighbours on both sides are merged.
PORTAKV_API int64_t portakv_runs_list(const int64_t *plan, const int64_t *copy, int64_t *out,
                                      int64_t room);

// Return the number of groups of units. In a group the numbers of units rise by one on both sides,
// and no unit but the first is a multiple of a side's limit (0: no limit). Ids are not checked.
// `most`: sort up to so many units by the source before; among more units, those that fall by one
// on both sides also form groups. 0: neither.
PORTAKV_API int64_t portakv_runs_groups(const int64_t *copy, int64_t unit, int64_t src_limit,
                                        int64_t dst_limit, int64_t most);

// List the pieces of a copy: `out` is a word, 1 if a piece has several rows, and six columns
// (destination, source, width, height, pitch of the destination, pitch of the source), of which
// only three are written if all pieces have one row. `request` is the words of a copy, of Limits
// (pieces.h), then
//   src_whole, dst_whole  all bytes at each address of a side; 0: unknown, or it has one address
//   merged                1: runs that meet where planes end are merged, too
//   edged                 1: the edges of allocations are listed; 0: they are asked for if needed
// and three lists of addresses that no piece crosses, each a pointer and a number: where
// registrations meet, and the edges of the allocations of each side.
PORTAKV_API int64_t portakv_pieces_list(const int64_t *plan, const int64_t *request, int64_t *out,
                                        int64_t room);

// List the pieces of runs that are in the order of the source, neighbours merged. `runs` is
// pointers to three columns (source, destination, bytes), their number, Limits, and three lists of
// addresses as above.
PORTAKV_API int64_t portakv_pieces_fold(const int64_t *runs, int64_t *out, int64_t room);

#ifdef __cplusplus
}
#endif

#endif
