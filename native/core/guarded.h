// SPDX-License-Identifier: Apache-2.0
// Runs the body of an exported function, and returns a code for each exception.
#ifndef PORTAKV_GUARDED_H
#define PORTAKV_GUARDED_H

#include <cstdint>

#include "core.h"
#include "runs.h"

namespace portakv {

template <class Body>
int64_t guarded(Body &&body) {
  try {
    return body();
  } catch (const Outside &) {
    return PORTAKV_RUNS_OUTSIDE;
  } catch (const Malformed &) {
    return PORTAKV_MALFORMED;
  } catch (...) {
    return PORTAKV_NO_MEMORY;
  }
}

}  // namespace portakv

#endif
