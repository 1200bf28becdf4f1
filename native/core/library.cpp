// SPDX-License-Identifier: Apache-2.0
// What the library says about itself.
#include "core.h"

// build_backend/compile_core.py passes the hash to the compiler.
#ifndef PORTAKV_CORE_SOURCES
#error "Expected the macro PORTAKV_CORE_SOURCES. Build with: python build_backend/compile_core.py"
#endif

const char *portakv_core_sources(void) { return PORTAKV_CORE_SOURCES; }

int portakv_core_abi(void) { return PORTAKV_CORE_ABI; }
