// SPDX-License-Identifier: Apache-2.0
// A HIP runtime and hipRTC without a device: the functions that portakv's `hip` calls, under their
// names. hipRTC compiles a kernel's text with g++, and a launch runs it on the CPU, every thread of
// every block. What the real functions refuse, these refuse too. EMULATED: it proves addresses,
// arguments and error paths, and nothing about a device.
//
// PORTAKV_SHIM is the path of kernel_on_cpu.h, PORTAKV_WARPS that of warps_on_cpu.h, PORTAKV_CXX the
// compiler, and PORTAKV_FAKE_PATCH a number that changes with the sources. The functions named
// hip_fake_* are for tests.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

// Of hip_runtime_api.h and hiprtc.h; beside them only what these functions return.
enum {
    SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_IMAGE = 200, NOT_FOUND = 500,
    LAUNCH_FAILURE = 719
};
enum {
    RTC_INVALID_INPUT = 3, RTC_INVALID_PROGRAM = 4, RTC_INVALID_OPTION = 5, RTC_COMPILATION = 6
};
const std::map<int, const char*> names = {
    {SUCCESS, "hipSuccess"}, {INVALID_VALUE, "hipErrorInvalidValue"},
    {NO_DEVICE, "hipErrorNoDevice"}, {INVALID_IMAGE, "hipErrorInvalidImage"},
    {NOT_FOUND, "hipErrorNotFound"}, {LAUNCH_FAILURE, "hipErrorLaunchFailure"}};
const std::map<int, const char*> rtc_names = {
    {SUCCESS, "HIPRTC_SUCCESS"}, {RTC_INVALID_INPUT, "HIPRTC_ERROR_INVALID_INPUT"},
    {RTC_INVALID_PROGRAM, "HIPRTC_ERROR_INVALID_PROGRAM"},
    {RTC_INVALID_OPTION, "HIPRTC_ERROR_INVALID_OPTION"},
    {RTC_COMPILATION, "HIPRTC_ERROR_COMPILATION"}};

const char magic[] = "portakv-hip-fake";  // stands before the library in a "code object"
const char header[] = "extern \"C\" int fake_run_";

struct Program { std::string text, log, code; };
struct Launched { unsigned grid[3], block[3], shared; void* stream; };
typedef int (*Run)(const void* argument, unsigned blocks, unsigned planes, unsigned threads);
struct Function { Run run; unsigned bytes; };

std::mutex lock;
std::map<std::string, int> failing;  // by function: what it returns
int devices = 1;
std::atomic<long> launches{0}, number{0};
Launched last;

int failure(const char* function) {
    std::lock_guard<std::mutex> held(lock);
    const auto found = failing.find(function);
    return found == failing.end() ? 0 : found->second;
}

// A folder of this process, which is empty when it ends.
struct Folder {
    std::string name;
    Folder() {
        const char* base = getenv("TMPDIR");
        name = std::string(base && *base ? base : "/tmp") + "/portakv-hip-fake-XXXXXX";
        if (!mkdtemp(&name[0])) name.clear();
    }
    ~Folder() { rmdir(name.c_str()); }
};

const std::string& folder() {
    static const Folder made;
    return made.name;
}

std::string content(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream all;
    all << file.rdbuf();
    return all.str();
}

// Return whether the lanes of a kernel's warps exchange values.
bool has_warps(const std::string& text) { return text.find("__shared__") != std::string::npos; }

// Behind a text: for each of its kernels, which have one argument, a function that runs it, and
// that argument's size.
std::string runners(const std::string& text) {
    const std::string opening = "__global__ void ", bounds = "PORTAKV_BOUNDS(";
    std::string found;
    for (size_t at = text.find(opening); at != std::string::npos; at = text.find(opening, at)) {
        at += opening.size();
        if (text.compare(at, bounds.size(), bounds) == 0) at = text.find(')', at) + 2;
        const size_t bracket = text.find('(', at), end = text.find(')', at);
        if (bracket > end || end == std::string::npos) break;
        std::istringstream said(text.substr(bracket + 1, end - bracket - 1));  // const Type name
        std::string name = text.substr(at, bracket - at), type, word, next;
        for (; said >> next; word = next) type = word;
        const std::string run = has_warps(text)
            ? "    return planes != 1 || run_warps<" + type + ">("
                + name + ", argument, blocks, threads, false);\n}\n"
            : "    run_grid<" + type + ">("
                + name + ", argument, blocks, planes, threads);\n    return 0;\n}\n";
        found += header + name
            + "(const void* argument, unsigned blocks, unsigned planes, unsigned threads) {\n" + run
            + "extern \"C\" unsigned fake_bytes_" + name + "() { return sizeof(" + type + "); }\n";
    }
    return found;
}

int build(Program& program) {
    const std::string stem = folder() + "/kernel" + std::to_string(number++);
    {
        std::ofstream file(stem + ".cpp");
        // The text takes the words that are for AMD's compiler; g++ has one address space.
        file << "#include \"" PORTAKV_SHIM "\"\n#define __HIPCC_RTC__ 1\n#define __AMDGCN__ 1\n"
             << "#define address_space(number)\n"
             << (has_warps(program.text) ? "#include \"" PORTAKV_WARPS "\"\n" : "")
             << "#line 1 \"portakv_rows.hip\"\n"
             << program.text << runners(program.text);
    }
    const std::string command =
        "LD_PRELOAD= '" PORTAKV_CXX "' -std=c++17 -O1 -w -shared -fPIC '" + stem + ".cpp' -o '"
        + stem + ".so' >'" + stem + ".log' 2>&1";
    const int status = system(command.c_str());
    program.log = content(stem + ".log");
    if (status == 0) {
        const std::string library = content(stem + ".so");
        const uint64_t bytes = library.size();
        program.code.assign(magic, sizeof magic);
        program.code.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
        program.code += library;
    }
    for (const char* end : {".cpp", ".so", ".log"}) unlink((stem + end).c_str());
    return status ? RTC_COMPILATION : 0;
}

const char* named(const std::map<int, const char*>& table, int error, const char* unknown) {
    const auto found = table.find(error);
    return found == table.end() ? unknown : found->second;
}

}  // namespace

extern "C" {

// For tests

void hip_fake_fail(const char* function, int error) {
    std::lock_guard<std::mutex> held(lock);
    if (error) failing[function] = error; else failing.erase(function);
}
void hip_fake_devices(int count) { devices = count; }
long hip_fake_launches() { return launches; }
void hip_fake_last(unsigned* seven, void** stream) {
    memcpy(seven, last.grid, 3 * sizeof(unsigned));
    memcpy(seven + 3, last.block, 3 * sizeof(unsigned));
    seven[6] = last.shared;
    *stream = last.stream;
}
unsigned hip_fake_argument_bytes(const Function* function) { return function->bytes; }

// The runtime

const char* hipGetErrorName(int error) { return named(names, error, "hipErrorUnknown"); }
const char* hipGetErrorString(int error) {
    return error == NO_DEVICE ? "no ROCm-capable device is detected" : hipGetErrorName(error);
}

int hipGetDeviceCount(int* count) {
    if (const int error = failure("hipGetDeviceCount")) return error;
    *count = devices;
    return devices ? SUCCESS : NO_DEVICE;
}

int hipRuntimeGetVersion(int* version) {
    *version = PORTAKV_FAKE_PATCH;  // 0.0.x: no real HIP is
    return failure("hipRuntimeGetVersion");
}

int hipHostGetDevicePointer(void** device, void* host, unsigned flags) {
    if (const int error = failure("hipHostGetDevicePointer")) return error;
    if (!host || flags) return INVALID_VALUE;
    *device = host;
    return SUCCESS;
}

int hipModuleLoadData(void** module, const void* image) {
    if (const int error = failure("hipModuleLoadData")) return error;
    const char* at = static_cast<const char*>(image);
    if (!at || memcmp(at, magic, sizeof magic)) return INVALID_IMAGE;
    uint64_t bytes;
    memcpy(&bytes, at + sizeof magic, sizeof bytes);
    const std::string path = folder() + "/module" + std::to_string(number++) + ".so";
    std::ofstream(path, std::ios::binary).write(at + sizeof magic + sizeof bytes, bytes);
    *module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    unlink(path.c_str());
    return *module ? SUCCESS : INVALID_IMAGE;
}

int hipModuleGetFunction(void** function, void* module, const char* name) {
    if (const int error = failure("hipModuleGetFunction")) return error;
    void* run = dlsym(module, (std::string("fake_run_") + name).c_str());
    void* bytes = dlsym(module, (std::string("fake_bytes_") + name).c_str());
    if (!run || !bytes) return NOT_FOUND;
    *function = new Function{
        reinterpret_cast<Run>(run), reinterpret_cast<unsigned (*)()>(bytes)()};
    return SUCCESS;
}

int hipModuleLaunchKernel(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** extra) {
    if (const int error = failure("hipModuleLaunchKernel")) return error;
    // No empty grid, at most 1,024 threads in a block, fewer than 2^32 threads along an axis.
    if (!function || !gx || !gy || !gz || !bx || !by || !bz) return INVALID_VALUE;
    if (bx * by * bz > 1024 || (uint64_t)gx * bx >> 32 || gy > 65535 || gz > 65535)
        return INVALID_VALUE;
    if (!arguments || extra) return INVALID_VALUE;
    {
        std::lock_guard<std::mutex> held(lock);
        last = {{gx, gy, gz}, {bx, by, bz}, shared, stream};
    }
    ++launches;
    // A launch copies its arguments before it returns, so that what is done to them later is late.
    const Function* called = static_cast<Function*>(function);
    std::vector<uint64_t> argument(called->bytes / 8 + 1);
    memcpy(argument.data(), arguments[0], called->bytes);
    // Threads of a block that wait at different barriers never end on a device. Lanes of a warp that
    // exchange values at different places get wrong ones.
    return called->run(argument.data(), gx, gy, bx) ? LAUNCH_FAILURE : SUCCESS;
}

// hipRTC

const char* hiprtcGetErrorString(int error) {
    return named(rtc_names, error, "HIPRTC_ERROR_UNKNOWN");
}

int hiprtcVersion(int* major, int* minor) {
    *major = *minor = 0;
    return failure("hiprtcVersion");
}

int hiprtcCreateProgram(
    void** program, const char* text, const char*, int headers, const char**, const char**) {
    if (const int error = failure("hiprtcCreateProgram")) return error;
    if (!text || headers) return RTC_INVALID_INPUT;
    *program = new Program{text, "", ""};
    return SUCCESS;
}

int hiprtcCompileProgram(void* program, int count, const char** options) {
    if (const int error = failure("hiprtcCompileProgram")) return error;
    Program& compiled = *static_cast<Program*>(program);
    bool target = false;
    for (int n = 0; n < count; ++n) {
        const std::string option = options[n];
        if (option.rfind("--offload-arch=gfx", 0) == 0) {
            target = true;
        } else if (option.rfind("-std=", 0) && option.rfind("-O", 0)) {
            compiled.log = "unknown option " + option;
            return RTC_INVALID_OPTION;
        }
    }
    if (!target) {
        compiled.log = "no --offload-arch was given";
        return RTC_INVALID_OPTION;
    }
    return build(compiled);
}

int hiprtcGetProgramLogSize(void* program, size_t* size) {
    *size = static_cast<Program*>(program)->log.size() + 1;
    return failure("hiprtcGetProgramLogSize");
}

int hiprtcGetProgramLog(void* program, char* log) {
    const std::string& kept = static_cast<Program*>(program)->log;
    memcpy(log, kept.c_str(), kept.size() + 1);
    return failure("hiprtcGetProgramLog");
}

int hiprtcGetCodeSize(void* program, size_t* size) {
    *size = static_cast<Program*>(program)->code.size();
    return *size ? failure("hiprtcGetCodeSize") : RTC_INVALID_PROGRAM;
}

int hiprtcGetCode(void* program, char* code) {
    const std::string& kept = static_cast<Program*>(program)->code;
    memcpy(code, kept.data(), kept.size());
    return failure("hiprtcGetCode");
}

int hiprtcDestroyProgram(void** program) {
    if (!program || !*program) return RTC_INVALID_PROGRAM;
    delete static_cast<Program*>(*program);
    *program = nullptr;
    return SUCCESS;
}

}  // extern "C"
