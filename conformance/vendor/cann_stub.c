// SPDX-License-Identifier: Apache-2.0
// The part of CANN's C interface that torch_npu needs before it computes anything, on the host:
// memory, copies, streams and events. It is no NPU: device memory is the host's, two devices share
// it, and every copy is done when its call returns, so that it says nothing about order.
// What is not here must not pass for done: RAISES(name), of which the build appends one for each
// symbol that the wheel still wants, says so and fails, and no aclnn function exists at all.
// Signatures: the headers under include/third_party/acl/inc/acl of the torch_npu wheel.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 200001, BAD_ALLOC = 200000, DEVICES = 2, LINE = 512, POISON = 0xDB };

#define RAISES(name)                                                              \
    int name(void) {                                                              \
        fprintf(stderr, "The stub of CANN does not emulate %s.\n", #name);        \
        return NOT_SUPPORTED;                                                     \
    }
#define QUIET(name) \
    int name(void) { return OK; }

static __thread int device;
static char contexts[DEVICES];

// The process, its devices and contexts.
QUIET(aclInit) QUIET(aclFinalize) QUIET(aclSetCompileopt) QUIET(aclAppLog)
QUIET(aclmdlInitDump) QUIET(aclmdlFinalizeDump)
QUIET(aclrtSetDeviceSatMode) QUIET(aclrtSetOpExecuteTimeOut) QUIET(aclrtCtxSetSysParamOpt) QUIET(aclrtSetSysParamOpt) QUIET(aclrtResetDevice)
QUIET(MsprofRegisterCallback) QUIET(MsprofReportApi) QUIET(MsprofReportCompactInfo)
QUIET(MsprofReportAdditionalInfo)
uint64_t MsprofGetHashId(const char *text, size_t length) { return length + (text ? *text : 0); }
uint64_t MsprofSysCycleTime(void) { return 0; }
const char *aclGetRecentErrMsg(void) { return "the stub of CANN emulates no such thing"; }
int aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return OK; }
int aclrtGetDevice(int32_t *which) { *which = device; return OK; }
int aclrtSetDevice(int32_t which) {
    if (which < 0 || which >= DEVICES) return NOT_SUPPORTED;
    device = which;
    return OK;
}
int aclrtGetCurrentContext(void **context) { *context = &contexts[device]; return OK; }
int aclrtSetCurrentContext(void *context) { device = (int)((char *)context - contexts); return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t from, int32_t to) {
    *can = from != to;
    return OK;
}
QUIET(aclrtDeviceEnablePeerAccess)

// Memory. It is filled with poison, so that a read of what was not written shows.
static int allocate(void **to, size_t bytes) {
    size_t whole = (bytes + LINE - 1) / LINE * LINE + LINE;
    *to = aligned_alloc(LINE, whole);
    if (!*to) return BAD_ALLOC;
    memset(*to, POISON, whole);
    return OK;
}
int aclrtMalloc(void **to, size_t bytes, int policy) { (void)policy; return allocate(to, bytes); }
int aclrtMallocHost(void **to, size_t bytes) { return allocate(to, bytes); }
int aclrtFree(void *at) { free(at); return OK; }
int aclrtFreeHost(void *at) { free(at); return OK; }
int aclrtGetMemInfo(int kind, size_t *left, size_t *total) {
    (void)kind;
    *left = (size_t)8 << 30;
    *total = (size_t)16 << 30;
    return OK;
}
int aclrtMemcpy(void *to, size_t most, const void *from, size_t bytes, int kind) {
    (void)kind;
    if (bytes > most) return NOT_SUPPORTED;
    memmove(to, from, bytes);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t bytes, int kind, void *on) {
    (void)on;
    return aclrtMemcpy(to, most, from, bytes, kind);
}
int aclrtMemset(void *at, size_t most, int32_t value, size_t bytes) {
    if (bytes > most) return NOT_SUPPORTED;
    memset(at, value, bytes);
    return OK;
}

// Streams and events: handles that differ. All work behind them is done already.
static int handle(void **made) { *made = malloc(1); return *made ? OK : BAD_ALLOC; }
int aclrtCreateStream(void **made) { return handle(made); }
int aclrtCreateStreamWithConfig(void **made, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    return handle(made);
}
int aclrtCreateEventExWithFlag(void **made, uint32_t flag) { (void)flag; return handle(made); }
int aclrtCreateEventWithFlag(void **made, uint32_t flag) { (void)flag; return handle(made); }
int aclrtDestroyStream(void *made) { free(made); return OK; }
int aclrtDestroyEvent(void *made) { free(made); return OK; }
QUIET(aclrtRecordEvent) QUIET(aclrtResetEvent) QUIET(aclrtStreamWaitEvent)
QUIET(aclrtSynchronizeEvent) QUIET(aclrtSynchronizeStream) QUIET(aclrtSynchronizeDevice)
QUIET(aclrtSynchronizeStreamWithTimeout) QUIET(aclrtSynchronizeDeviceWithTimeout)
int aclrtQueryEventStatus(void *event, int *status) { (void)event; *status = 1; return OK; }
int aclrtStreamQuery(void *stream, int *status) { (void)stream; *status = 0; return OK; }
int aclrtEventElapsedTime(float *ms, void *from, void *to) {
    (void)from, (void)to;
    *ms = 0;
    return OK;
}
