// SPDX-License-Identifier: Apache-2.0
// Reads and writes below a folder that fail or hang, for any program: LD_PRELOAD this library.
// FAULTY_FOLDER names the folder. FAULTY_STATE names a file of four int32, which another thread may
// change: the kind of fault, the number of calls of which one is hit, the calls so far, and the
// calls that were hit. Kinds: 0 none, 1 reads fail with EIO, 2 writes fail with ENOSPC, 3 reads
// hang until the kind changes. io_uring makes no such calls: PORTAKV_IO=threads does.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, READS_FAIL, WRITES_FAIL, READS_HANG };
static volatile int *state;
static const char *folder;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTY_STATE");
    folder = getenv("FAULTY_FOLDER");
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *at = mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) state = at;
    close(fd);
}

// Return the errno that a call gets, or 0 after a hang.
static int fault(int fd, int writes) {
    if (!state || !folder || state[0] == NONE) return 0;
    if (writes != (state[0] == WRITES_FAIL)) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || strncmp(path, folder, strlen(folder))) return 0;
    if (__atomic_add_fetch(&state[2], 1, __ATOMIC_SEQ_CST) % state[1]) return 0;
    __atomic_add_fetch(&state[3], 1, __ATOMIC_SEQ_CST);
    if (state[0] == READS_FAIL) return EIO;
    if (state[0] == WRITES_FAIL) return ENOSPC;
    while (state[0] == READS_HANG) usleep(1000);
    return 0;
}

#define CALL(name, writes, parameters, arguments)              \
    ssize_t name parameters {                                  \
        static ssize_t(*next) parameters;                      \
        if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name);  \
        int code = fault(fd, writes);                          \
        if (!code) return next arguments;                      \
        errno = code;                                          \
        return -1;                                             \
    }

CALL(read, 0, (int fd, void *to, size_t n), (fd, to, n))
CALL(pread, 0, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
CALL(pread64, 0, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
CALL(readv, 0, (int fd, const struct iovec *to, int n), (fd, to, n))
CALL(preadv, 0, (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at))
CALL(preadv64, 0, (int fd, const struct iovec *to, int n, off64_t at), (fd, to, n, at))
CALL(preadv2, 0, (int fd, const struct iovec *to, int n, off_t at, int f), (fd, to, n, at, f))
CALL(preadv64v2, 0, (int fd, const struct iovec *to, int n, off64_t at, int f), (fd, to, n, at, f))
CALL(write, 1, (int fd, const void *of, size_t n), (fd, of, n))
CALL(pwrite, 1, (int fd, const void *of, size_t n, off_t at), (fd, of, n, at))
CALL(pwrite64, 1, (int fd, const void *of, size_t n, off64_t at), (fd, of, n, at))
CALL(writev, 1, (int fd, const struct iovec *of, int n), (fd, of, n))
CALL(pwritev, 1, (int fd, const struct iovec *of, int n, off_t at), (fd, of, n, at))
CALL(pwritev64, 1, (int fd, const struct iovec *of, int n, off64_t at), (fd, of, n, at))
CALL(pwritev2, 1, (int fd, const struct iovec *of, int n, off_t at, int f), (fd, of, n, at, f))
CALL(pwritev64v2, 1, (int fd, const struct iovec *of, int n, off64_t at, int f),
     (fd, of, n, at, f))
