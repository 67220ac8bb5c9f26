// A CUDA driver of the tests' own: the calls of the driver API that the library makes, with host memory as device memory.
//
// The null stream, which libtorch uses, does everything at once, as libtorch's operations on the CPU do. Work of any other
// stream waits in a queue until something waits for it: the latest time that the API allows. So memory that is given back
// too early, or read too early, shows. What the API forbids and a device would not always punish is kept as text
// (`driver_faults`); what the API refuses is refused with its error code. Kernels are those of a library of `cuda_host`.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tensor_map.h"

namespace {

// CUresult.
enum : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
};

constexpr int DYNAMIC_BY_DEFAULT = 48 << 10;
// Shared memory that the system takes of each block.
constexpr int RESERVED = 1 << 10;
constexpr int THREADS_OF_MULTIPROCESSOR = 2048;

struct Device {
    std::string name;
    int major, minor, multiprocessors, shared, l2;
};

struct Module {
    const Device* device;
    std::string ptx;
    std::map<std::string, struct Function*> functions;
};

struct Function {
    std::string name;
    const Device* device;
    std::vector<unsigned> parameters; // bytes
    int static_bytes, dynamic_limit;
};

struct Range {
    const unsigned char* begin;
    size_t bytes;
    bool meets(const Range& other) const { return begin < other.begin + other.bytes && other.begin < begin + bytes; }
};

struct Operation {
    std::function<void()> run;
    std::vector<Range> touches;
};

struct Stream {
    std::deque<Operation> queue;
    uint64_t issued, done;
    bool fenced; // waits for an event of the null stream since its last copy
};

struct Event {
    Stream* stream; // null: of the null stream, or never recorded
    uint64_t ticket;
    bool recorded;
};

// `Launch` of launch.cpp.
struct HostLaunch {
    const char* kernel;
    uint32_t grid[3];
    uint32_t threads[2];
    uint32_t dynamic_bytes, resident, order;
    uint64_t seed;
    const void* buffers;
    uint32_t buffer_count, argument_count;
    void* const* arguments;
    const uint32_t* argument_sizes;
};

std::recursive_mutex one_at_a_time;
#define LOCK std::lock_guard<std::recursive_mutex> lock(one_at_a_time)

std::deque<Device> devices;
std::set<Module*> modules;
std::set<Stream*> streams;
std::set<Event*> events;
std::map<void*, size_t> page_locked;
size_t page_locked_limit = SIZE_MAX, page_locked_bytes = 0;
std::vector<const char* (*)(const HostLaunch*)> kernels;
std::map<std::string, uint64_t> calls;
std::string faults, answer;
thread_local int current = -1; // the device whose context is bound

bool is_current(const Device* device) { return current >= 0 && device == &devices[(size_t)current]; }

void fault(const std::string& what) { faults += what + "\n"; }

void run_to(Stream* stream, uint64_t ticket) {
    while (stream->done < ticket) {
        Operation operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done += 1;
        operation.run();
    }
}

void issue(Stream* stream, Operation operation) {
    if (stream == nullptr) return operation.run();
    stream->queue.push_back(std::move(operation));
    stream->issued += 1;
}

bool known(Stream* stream) { return stream == nullptr || streams.count(stream) != 0; }

bool is_page_locked(const Range& range) {
    auto next = page_locked.upper_bound(const_cast<unsigned char*>(range.begin));
    if (next == page_locked.begin()) return false;
    const auto& [begin, bytes] = *--next;
    return range.begin + range.bytes <= static_cast<unsigned char*>(begin) + bytes;
}

int copy(void* to, const void* from, size_t bytes, Stream* stream, const void* host) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (!known(stream)) return INVALID_HANDLE;
    const Range on_host{static_cast<const unsigned char*>(host), bytes};
    if (stream != nullptr && !std::exchange(stream->fenced, false)) {
        fault("a copy does not wait for libtorch's work, which may still use the memory");
    }
    if (!is_page_locked(on_host)) fault("a copy of memory that is not page-locked, which is not asynchronous");
    issue(stream, {[=] { memcpy(to, from, bytes); },
                   {{static_cast<unsigned char*>(to), bytes}, {static_cast<const unsigned char*>(from), bytes}}});
    return SUCCESS;
}

// The parameters and the static shared memory of an entry of a text of PTX.
std::unique_ptr<Function> parse(const std::string& ptx, const std::string& name) {
    size_t at = ptx.find(".entry " + name + "(");
    if (at == std::string::npos) return nullptr;
    const size_t list = ptx.find('(', at), end = ptx.find(')', list), next = ptx.find(".entry ", end);
    auto function = std::make_unique<Function>();
    function->name = name;
    auto bytes_of = [](const std::string& line) -> unsigned {
        const size_t bracket = line.find('[');
        if (bracket != std::string::npos) return (unsigned)atoi(line.c_str() + bracket + 1);
        for (unsigned bits : {8u, 16u, 32u, 64u}) {
            for (char type : {'u', 's', 'f', 'b'}) {
                if (line.find(std::string(".") + type + std::to_string(bits) + " ") != std::string::npos) return bits / 8;
            }
        }
        return 0;
    };
    auto each_line = [&](size_t from, size_t to, const char* word, auto use) {
        for (size_t i = ptx.find(word, from); i < to; i = ptx.find(word, i + 1)) {
            use(ptx.substr(i, ptx.find_first_of(",;)\n", i) - i));
        }
    };
    each_line(list, end, ".param ", [&](const std::string& line) { function->parameters.push_back(bytes_of(line)); });
    each_line(end, next, ".shared ", [&](const std::string& line) { function->static_bytes += (int)bytes_of(line); });
    return function;
}

int blocks_of_multiprocessor(const Function& f, int threads, size_t dynamic) {
    if ((int)dynamic > f.dynamic_limit) return 0;
    const int by_threads = THREADS_OF_MULTIPROCESSOR / threads;
    const int bytes = (int)dynamic + f.static_bytes + RESERVED;
    return std::min(by_threads, (f.device->shared + RESERVED) / bytes);
}

int launch(Function* f, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned dynamic, Stream* stream,
           void** arguments, bool cooperative) {
    LOCK;
    calls["launch " + f->name] += 1;
    if (current < 0) return INVALID_CONTEXT;
    if (!is_current(f->device) || !known(stream)) return INVALID_HANDLE;
    if ((int)dynamic > f->dynamic_limit || block[2] != 1) return INVALID_VALUE;
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    const int resident =
        blocks_of_multiprocessor(*f, (int)(block[0] * block[1]), dynamic) * f->device->multiprocessors;
    if (resident == 0) return INVALID_VALUE;
    if (cooperative && blocks > (uint64_t)resident) return COOPERATIVE_LAUNCH_TOO_LARGE;
    if (stream != nullptr) fault(f->name + " is launched on another stream than libtorch's");
    const uint32_t at_once = cooperative ? (uint32_t)blocks : 2, count = (uint32_t)f->parameters.size();
    const HostLaunch host = {f->name.c_str(), {grid[0], grid[1], grid[2]}, {block[0], block[1]}, dynamic, at_once,
                             0, 0, nullptr, 0, count, arguments, f->parameters.data()};
    if (kernels.empty()) return SUCCESS;
    std::string error;
    for (auto run : kernels) {
        const char* text = run(&host);
        if (text == nullptr) return SUCCESS;
        error = text;
        if (error.find("there is no such kernel") == std::string::npos) break;
    }
    fault(f->name + ": " + error);
    return LAUNCH_FAILED;
}

} // namespace

extern "C" {
#pragma GCC visibility push(default)

// ---- what the tests call ----

void driver_add_device(const char* name, int major, int minor, int multiprocessors, int shared, int l2) {
    devices.push_back({name, major, minor, multiprocessors, shared, l2});
}
void driver_use_kernels(const char* library) {
    void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    kernels.push_back((const char* (*)(const HostLaunch*))dlsym(opened, "cuda_host_run"));
}
// What was done that the API forbids, a line each.
const char* driver_faults() {
    LOCK;
    answer = faults;
    return answer.c_str();
}
// How often a call was made, or a kernel launched (`launch NAME`).
uint64_t driver_calls(const char* name) {
    LOCK;
    return calls[name];
}
// Operations that nobody has waited for.
uint64_t driver_pending() {
    LOCK;
    uint64_t pending = 0;
    for (Stream* stream : streams) pending += stream->queue.size();
    return pending;
}
// Events, streams, modules and page-locked buffers that were made and not destroyed.
void driver_alive(uint64_t (&counts)[4]) {
    LOCK;
    counts[0] = events.size(), counts[1] = streams.size(), counts[2] = modules.size(), counts[3] = page_locked.size();
}
void driver_limit_page_locked(uint64_t bytes) { page_locked_limit = bytes; }

// ---- the driver API ----

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = (int)devices.size(), SUCCESS; }
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < (int)devices.size() ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char* name, int length, int device) {
    strncpy(name, devices.at((size_t)device).name.c_str(), (size_t)length);
    return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const Device& d = devices.at((size_t)device);
    switch (attribute) {
        case 16: return *value = d.multiprocessors, SUCCESS;
        case 38: return *value = d.l2, SUCCESS;
        case 75: return *value = d.major, SUCCESS;
        case 76: return *value = d.minor, SUCCESS;
        case 97: return *value = d.shared, SUCCESS; // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 115: return *value = 1, SUCCESS;       // MEMORY_POOLS_SUPPORTED
        default: return INVALID_VALUE;
    }
}
// A context is its device's number, from 1 on.
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1), SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = (void*)(intptr_t)(current + 1), SUCCESS; }
int cuCtxSetCurrent(void* context) { return current = (int)(intptr_t)context - 1, SUCCESS; }
int cuCtxSynchronize() {
    LOCK;
    for (Stream* stream : streams) run_to(stream, stream->issued);
    return current < 0 ? INVALID_CONTEXT : SUCCESS;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = size_t(1) << 34, *total = size_t(1) << 35, SUCCESS; }

int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    LOCK;
    calls["cuMemHostAlloc"] += 1;
    if (current < 0) return INVALID_CONTEXT;
    if (page_locked_bytes + bytes > page_locked_limit) return OUT_OF_MEMORY;
    *memory = malloc(bytes);
    page_locked[*memory] = bytes;
    page_locked_bytes += bytes;
    return SUCCESS;
}
int cuMemFreeHost(void* memory) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    const auto found = page_locked.find(memory);
    if (found == page_locked.end()) return INVALID_VALUE;
    const Range range{static_cast<unsigned char*>(memory), found->second};
    for (Stream* stream : streams) {
        for (const Operation& operation : stream->queue) {
            for (const Range& touched : operation.touches) {
                if (touched.meets(range)) fault("page-locked memory is freed while a copy of it is under way");
            }
        }
    }
    page_locked_bytes -= found->second;
    page_locked.erase(found);
    free(memory);
    return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    return copy((void*)to, from, bytes, stream, from);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    return copy(to, (const void*)from, bytes, stream, to);
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                           const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int, int) {
    LOCK;
    calls["cuTensorMapEncodeTiled"] += 1;
    if (current < 0) return INVALID_CONTEXT;
    const bool plain = type == 1 && rank == 2 && interleave == 0 && steps[0] == 1 && steps[1] == 1; // 16 bits
    const bool aligned = (uintptr_t)map % 64 == 0 && (uintptr_t)address % 16 == 0 && strides[0] % 16 == 0;
    const bool fits = box[0] * 2 <= 128 && box[0] <= 256 && box[1] <= 256 && box[0] > 0 && box[1] > 0;
    if (!plain || !aligned || !fits || swizzle != 3 || sizes[0] == 0 || sizes[1] == 0) return INVALID_VALUE;
    *static_cast<HostTensorMap*>(map) =
        {(uint64_t)address, sizes[0], sizes[1], strides[0], box[0], box[1], TENSOR_MAP_MARK, {}};
    return SUCCESS;
}

int cuModuleLoadData(Module** module, const void* image) {
    LOCK;
    calls["cuModuleLoadData"] += 1;
    if (current < 0) return INVALID_CONTEXT;
    *module = new Module{&devices.at((size_t)current), static_cast<const char*>(image), {}};
    modules.insert(*module);
    return SUCCESS;
}
int cuModuleUnload(Module* module) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (modules.count(module) == 0 || !is_current(module->device)) return INVALID_HANDLE;
    modules.erase(module);
    for (auto& [name, function] : module->functions) delete function;
    delete module;
    return SUCCESS;
}
// The same function each time: its attributes are shared by all who ask for it.
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (modules.count(module) == 0 || !is_current(module->device)) return INVALID_HANDLE;
    Function*& known = module->functions[name];
    if (known == nullptr) {
        known = parse(module->ptx, name).release();
        if (known == nullptr) return NOT_FOUND;
        known->device = module->device;
        known->dynamic_limit = DYNAMIC_BY_DEFAULT - known->static_bytes;
    }
    *function = known;
    return SUCCESS;
}
int cuFuncGetAttribute(int* value, int attribute, Function* function) {
    if (!is_current(function->device)) return INVALID_CONTEXT;
    switch (attribute) {
        case 1: return *value = function->static_bytes, SUCCESS;
        case 8: return *value = function->dynamic_limit, SUCCESS;
        default: return INVALID_VALUE;
    }
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    LOCK;
    if (!is_current(function->device)) return INVALID_CONTEXT;
    calls["cuFuncSetAttribute"] += 1;
    if (attribute != 8 || value < 0 || value + function->static_bytes > function->device->shared) return INVALID_VALUE;
    function->dynamic_limit = value;
    return SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads, size_t dynamic,
                                                         unsigned) {
    if (!is_current(function->device)) return INVALID_CONTEXT;
    *blocks = blocks_of_multiprocessor(*function, threads, dynamic);
    return SUCCESS;
}
int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned dynamic, Stream* stream, void** arguments, void**) {
    return launch(f, {gx, gy, gz}, {bx, by, bz}, dynamic, stream, arguments, false);
}
int cuLaunchCooperativeKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned dynamic, Stream* stream, void** arguments) {
    return launch(f, {gx, gy, gz}, {bx, by, bz}, dynamic, stream, arguments, true);
}

int cuStreamCreate(Stream** stream, unsigned flags) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (flags != 1) fault("a stream that waits for the null stream");
    *stream = new Stream{};
    streams.insert(*stream);
    return SUCCESS;
}
// Its work goes on.
int cuStreamDestroy_v2(Stream* stream) {
    LOCK;
    if (streams.erase(stream) == 0) return INVALID_HANDLE;
    run_to(stream, stream->issued);
    for (Event* event : events) {
        if (event->stream == stream) *event = {};
    }
    delete stream;
    return SUCCESS;
}
int cuStreamSynchronize(Stream* stream) {
    LOCK;
    calls["cuStreamSynchronize"] += 1;
    if (current < 0) return INVALID_CONTEXT;
    if (!known(stream)) return INVALID_HANDLE;
    if (stream != nullptr) run_to(stream, stream->issued);
    return SUCCESS;
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    calls["cuStreamWaitEvent"] += 1;
    if (!known(stream) || events.count(event) == 0) return INVALID_HANDLE;
    Stream* other = event->stream;
    if (other == nullptr && event->recorded && stream != nullptr) stream->fenced = true;
    if (other == nullptr || other == stream) return SUCCESS;
    issue(stream, {[other, ticket = event->ticket] {
                       if (streams.count(other) != 0) run_to(other, ticket);
                   },
                   {}});
    return SUCCESS;
}
int cuEventCreate(Event** event, unsigned) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    *event = new Event{};
    events.insert(*event);
    return SUCCESS;
}
int cuEventDestroy_v2(Event* event) {
    LOCK;
    if (events.erase(event) == 0) return INVALID_HANDLE;
    delete event;
    return SUCCESS;
}
int cuEventRecord(Event* event, Stream* stream) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (!known(stream) || events.count(event) == 0) return INVALID_HANDLE;
    *event = {stream, stream == nullptr ? 0 : stream->issued, true};
    return SUCCESS;
}
int cuEventQuery(Event* event) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (events.count(event) == 0) return INVALID_HANDLE;
    return event->stream == nullptr || event->stream->done >= event->ticket ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(Event* event) {
    LOCK;
    if (current < 0) return INVALID_CONTEXT;
    if (events.count(event) == 0) return INVALID_HANDLE;
    if (event->stream != nullptr) run_to(event->stream, event->ticket);
    return SUCCESS;
}

int cuGetErrorName(int error, const char** name) { return *name = "CUDA_ERROR", (void)error, SUCCESS; }
int cuGetErrorString(int error, const char** text) {
    switch (error) {
        case INVALID_VALUE: return *text = "invalid argument", SUCCESS;
        case OUT_OF_MEMORY: return *text = "out of memory", SUCCESS;
        case INVALID_DEVICE: return *text = "invalid device ordinal", SUCCESS;
        case INVALID_CONTEXT: return *text = "invalid device context", SUCCESS;
        case INVALID_HANDLE: return *text = "invalid resource handle", SUCCESS;
        case NOT_FOUND: return *text = "named symbol not found", SUCCESS;
        case LAUNCH_FAILED: return *text = "unspecified launch failure", SUCCESS;
        case COOPERATIVE_LAUNCH_TOO_LARGE: return *text = "too many blocks in cooperative launch", SUCCESS;
        default: return *text = "another error", SUCCESS;
    }
}

#pragma GCC visibility pop
}
