// SPDX-License-Identifier: Apache-2.0
// Load a core library and run its self-test, for an emulator of another processor, which has no
// Python. Prints the hash of the library's sources.
#include <dlfcn.h>
#include <stdio.h>

int main(int count, char **words) {
    void *library = count == 2 ? dlopen(words[1], RTLD_NOW) : NULL;
    if (library == NULL) {
        fprintf(stderr, "Expected a core library, got: %s\n", count == 2 ? dlerror() : "no path");
        return 2;
    }
    const char *(*sources)(void) = (const char *(*)(void))dlsym(library, "portakv_core_sources");
    int (*self_test)(void) = (int (*)(void))dlsym(library, "portakv_core_self_test");
    if (sources == NULL || self_test == NULL) {
        fprintf(stderr, "Expected the functions of core.h, got: %s\n", dlerror());
        return 2;
    }
    printf("%s\n", sources());
    return self_test() != 0;
}
