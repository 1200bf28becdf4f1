// SPDX-License-Identifier: Apache-2.0
// Checks of what the core assumes of its machine and of the build. They need neither a device nor
// Python, so that an emulator of another processor runs them.
#include "core.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

// Plans and packed formats are in the order of bytes that the host has.
bool lowest_byte_comes_first() {
    const uint32_t word = 1;
    return *reinterpret_cast<const unsigned char *>(&word) == 1;
}

bool addresses_fit_integers() { return sizeof(void *) == sizeof(int64_t); }

// The library brings its own C++ runtime, which must unwind inside the library.
bool exceptions_are_caught() {
    const std::vector<int> none;
    try {
        return none.at(1) == 0;
    } catch (const std::out_of_range &error) {
        return !std::string(error.what()).empty();
    }
}

// What a thread writes before a release is what another reads after the acquire.
bool threads_share_words() {
    int64_t value = 0;
    std::atomic<uint32_t> ready{0};
    std::thread writer([&] {
        value = 7;
        ready.store(1, std::memory_order_release);
    });
    while (ready.load(std::memory_order_acquire) == 0) {
        std::this_thread::yield();
    }
    const bool seen = value == 7;
    writer.join();
    return seen;
}

// A driver that is not installed is found missing; nothing aborts.
bool a_missing_driver_is_no_error() {
#if defined(_WIN32)
    return true;  // no driver is opened there
#else
    return dlopen("libportakv_no_such_driver.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr;
#endif
}

using Check = bool (*)();
const Check CHECKS[] = {
    lowest_byte_comes_first, addresses_fit_integers,       exceptions_are_caught,
    threads_share_words,     a_missing_driver_is_no_error,
};

}  // namespace

int portakv_core_self_test(void) {
    int number = 0;
    for (const Check check : CHECKS) {
        number += 1;
        if (!check()) {
            return number;
        }
    }
    return 0;
}
