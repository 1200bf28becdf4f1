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

#ifdef __cplusplus
}
#endif

#endif
