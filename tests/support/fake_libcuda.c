// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA driver's library in tests: its copies are memcpys, done at once, and it
// notes every call. Structures are declared as in cuda.h. -DBATCH=13 or 12 gives the batched copy
// as that version of CUDA has it; without, there is none.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    size_t srcXInBytes, srcY;
    unsigned int srcMemoryType;
    const void *srcHost;
    uint64_t srcDevice;
    void *srcArray;
    size_t srcPitch;
    size_t dstXInBytes, dstY;
    unsigned int dstMemoryType;
    void *dstHost;
    uint64_t dstDevice;
    void *dstArray;
    size_t dstPitch;
    size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;

typedef struct {
    unsigned int type;
    int id;
} CUmemLocation;

typedef struct {
    unsigned int srcAccessOrder;
    CUmemLocation srcLocHint, dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900 };
enum { MOST_CALLS = 4096, MAX_PITCH = 0x7fffffff };

typedef struct {
    char kind; // p: plain, r: rows, b: batch, w: wait for a word; e, a: an event
    uint64_t count, stream;
} Call;

typedef struct {
    uint64_t dst, src;
    size_t size;
    uint64_t stream;
} Sent;

static Call calls[MOST_CALLS];
static int made, refuse_at = -1;
static Sent sent[MOST_CALLS];
static int sends, page_tables = -1, untold;

int fake_calls(Call *out) {
    memcpy(out, calls, made * sizeof(Call));
    return made;
}

int fake_sent(Sent *out) {
    memcpy(out, sent, sends * sizeof(Sent));
    return sends;
}

void fake_forget(int refuse) {
    made = sends = 0;
    refuse_at = refuse;
}

// Whether the device of that number, and no other, reads pageable memory by the host's page tables.
void fake_page_tables(int device, int error) {
    page_tables = device;
    untold = error;
}

static int noted(char kind, uint64_t count, uint64_t stream) {
    if (made == refuse_at || made == MOST_CALLS) return INVALID_VALUE;
    calls[made++] = (Call){kind, count, stream};
    return 0;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}

int cuMemcpyAsync(uint64_t dst, uint64_t src, size_t size, uint64_t stream) {
    if (noted('p', 1, stream)) return INVALID_VALUE;
    memcpy((void *)dst, (const void *)src, size);
    return 0;
}

// How this thread minds captures of other threads: 0: it may not allocate meanwhile.
static __thread int capture_mode;

int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

// Words of pinned memory that are allocated one by one.
static uint32_t words[MOST_CALLS];
static int allocated, full, another_captures, without_waits;

// Whether no memory can be pinned, whether another thread captures a graph, and whether the device
// has no wait for a word.
void fake_device(int no_room, int captures, int no_waits) {
    full = no_room;
    another_captures = captures;
    without_waits = no_waits;
}

int cuMemHostAlloc(uint64_t *address, size_t size, unsigned flags) {
    if (another_captures && capture_mode == 0) return CAPTURE_UNSUPPORTED;
    if (full || allocated == MOST_CALLS) return OUT_OF_MEMORY;
    if (size != sizeof(uint32_t) || flags != 1) return INVALID_VALUE;
    words[allocated] = 0x80000000; // what was there before
    *address = (uint64_t)&words[allocated++];
    return 0;
}

// Waits for a word that was allocated here, and for no other memory; refuses a wait without an end.
int cuStreamWaitValue32_v2(uint64_t stream, uint64_t address, uint32_t value, unsigned flags) {
    if (without_waits) return NOT_SUPPORTED;
    uint64_t first = (uint64_t)words, past = (uint64_t)(words + allocated);
    if (address < first || address >= past || (address - first) % sizeof(uint32_t)) return INVALID_VALUE;
    if (flags || (int32_t)(*(uint32_t *)address - value) < 0 || noted('w', 1, stream)) return INVALID_VALUE;
    return 0;
}

// Events from 500 on. Noted: e: one marks the work of a stream, a: a stream waits for one.
int cuEventCreate(uint64_t *event, unsigned flags) {
    static uint64_t events = 500;
    if (flags != 2) return INVALID_VALUE;
    *event = events++;
    return 0;
}

int cuEventDestroy_v2(uint64_t event) { return event < 500 ? INVALID_VALUE : 0; }

int cuEventRecord(uint64_t event, uint64_t stream) {
    return event < 500 || noted('e', event, stream) ? INVALID_VALUE : 0;
}

int cuStreamWaitEvent(uint64_t stream, uint64_t event, unsigned flags) {
    return event < 500 || flags || noted('a', event, stream) ? INVALID_VALUE : 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t dst, uint64_t src, size_t size, uint64_t stream) {
    if (noted('h', 1, stream)) return INVALID_VALUE;
    int at = __atomic_fetch_add(&sends, 1, __ATOMIC_SEQ_CST); // threads call at the same time
    sent[at] = (Sent){dst, src, size, stream};
    memcpy((void *)dst, (const void *)src, size);
    return 0;
}

int cuStreamQuery(uint64_t stream) { return 0; }

// Handles from 1000 on; none of a priority below -5.
int cuStreamCreateWithPriority(uint64_t *stream, unsigned flags, int priority) {
    static uint64_t streams = 1000;
    if (flags != 1 || priority < -5) return INVALID_VALUE;
    *stream = streams++;
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (untold || attribute != 100) return INVALID_VALUE;
    *value = device == page_tables;
    return 0;
}

// One address belongs to a device; for address 13 there is no context.
static uint64_t owned;
static int owner;
void fake_owner(uint64_t address, int device) {
    owned = address;
    owner = device;
}

int cuPointerGetAttribute(int *found, int attribute, uint64_t address) {
    if (address == 13) return 201;
    if (attribute != 9 || address != owned) return INVALID_VALUE;
    *found = owner;
    return 0;
}

int hipPointerGetAttribute(int *found, int attribute, uint64_t address) {
    return cuPointerGetAttribute(found, attribute, address);
}

int cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *asked, uint64_t stream) {
    const char *src = asked->srcMemoryType == 1 ? asked->srcHost : (const char *)asked->srcDevice;
    char *dst = asked->dstMemoryType == 1 ? asked->dstHost : (char *)asked->dstDevice;
    if (!src || !dst || asked->srcMemoryType + asked->dstMemoryType != 3) return INVALID_VALUE;
    if (asked->srcPitch < asked->WidthInBytes || asked->srcPitch > MAX_PITCH) return INVALID_VALUE;
    if (asked->dstPitch < asked->WidthInBytes || asked->dstPitch > MAX_PITCH) return INVALID_VALUE;
    if (asked->srcXInBytes || asked->srcY || asked->dstXInBytes || asked->dstY) return INVALID_VALUE;
    if (noted('r', asked->Height, stream)) return INVALID_VALUE;
    for (size_t row = 0; row < asked->Height; row++)
        memcpy(dst + row * asked->dstPitch, src + row * asked->srcPitch, asked->WidthInBytes);
    return 0;
}

__attribute__((unused)) static int batch(const uint64_t *dsts, const uint64_t *srcs,
                                         const size_t *sizes, size_t count,
                                         const CUmemcpyAttributes *attrs, const size_t *firsts,
                                         size_t attributes, uint64_t stream) {
    if (stream <= 1 || !count || attributes != 1 || firsts[0]) return INVALID_VALUE;
    if (attrs->srcAccessOrder != 1 || attrs->flags > 1) return INVALID_VALUE;
    if (noted('b', count, stream)) return INVALID_VALUE;
    for (size_t i = count; i-- > 0;) // in no order that may be relied on
        memcpy((void *)dsts[i], (const void *)srcs[i], sizes[i]);
    return 0;
}

#if BATCH == 13
int cuMemcpyBatchAsync_v2(const uint64_t *dsts, const uint64_t *srcs, const size_t *sizes,
                          size_t count, const CUmemcpyAttributes *attrs, const size_t *firsts,
                          size_t attributes, uint64_t stream) {
    return batch(dsts, srcs, sizes, count, attrs, firsts, attributes, stream);
}
#elif BATCH == 12
int cuMemcpyBatchAsync(const uint64_t *dsts, const uint64_t *srcs, const size_t *sizes,
                       size_t count, const CUmemcpyAttributes *attrs, const size_t *firsts,
                       size_t attributes, size_t *failed, uint64_t stream) {
    *failed = 0;
    return batch(dsts, srcs, sizes, count, attrs, firsts, attributes, stream);
}
#endif
