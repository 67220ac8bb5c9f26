// What Rust calls.
#include <cstdlib>

#include "machine.h"

namespace {

struct Given {
    unsigned char* begin;
    uint64_t bytes;
    uint32_t writable;
};

struct Launch {
    const char* kernel;
    uint32_t grid[3];
    uint32_t threads[2];
    uint32_t dynamic_bytes;
    uint32_t resident; // blocks that run at the same time
    uint32_t order;
    uint64_t seed;
    const Given* buffers;
    uint32_t buffer_count;
    uint32_t argument_count;
    void* const* arguments;
    const uint32_t* argument_sizes;
};

using cuda_host::machine;

// memory.cpp keeps a block's number in 16 bits, and needs the last ones for itself.
constexpr uint64_t MOST_BLOCKS = 60000;

// Why this cannot be launched; empty when it can.
std::string refusal(const Launch& launch) {
    for (unsigned i = 0; i < cuda_host::library.count; ++i) {
        if (strcmp(cuda_host::library.kernels[i].name, launch.kernel) == 0) machine.kernel = &cuda_host::library.kernels[i];
    }
    if (machine.kernel == nullptr) return "there is no such kernel";
    if (machine.kernel->arguments != launch.argument_count) return "it takes another number of arguments";
    for (unsigned i = 0; i < launch.argument_count; ++i) {
        if (machine.kernel->sizes[i] != launch.argument_sizes[i]) {
            return "its argument " + std::to_string(i) + " has another size";
        }
    }
    const uint64_t blocks = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (blocks == 0 || blocks > MOST_BLOCKS) return "its grid is empty or too large";
    if (machine.thread_count == 0 || machine.thread_count > cuda_host::MOST_THREADS ||
        machine.thread_count % cuda_host::LANES != 0) {
        return "its blocks have no threads, too many, or a part of a warp";
    }
    if (launch.resident == 0) return "none of its blocks may run";
    if (launch.dynamic_bytes > cuda_host::DYNAMIC_BYTES) return "it asks for too much shared memory";
    return "";
}

} // namespace

extern "C" {

// Runs a kernel to its end; null, or what went wrong, until the next call. One call at a time.
__attribute__((visibility("default"))) const char* cuda_host_run(const Launch* launch) {
    machine.error.clear();
    machine.kernel = nullptr;
    machine.arguments = launch->arguments;
    machine.grid = {launch->grid[0], launch->grid[1], launch->grid[2]};
    machine.threads = {launch->threads[0], launch->threads[1], 1};
    machine.thread_count = launch->threads[0] * launch->threads[1];
    machine.dynamic_bytes = launch->dynamic_bytes;
    machine.order = cuda_host::Order(launch->order);
    machine.random = launch->seed;
    machine.words.clear();
    machine.installed = nullptr;
    machine.error = refusal(*launch);
    if (machine.error.empty()) {
        cuda_host::find_memory();
        for (unsigned i = 0; i < launch->buffer_count; ++i) {
            const Given& given = launch->buffers[i];
            auto* touches = static_cast<cuda_host::Touch*>(calloc(given.bytes, sizeof(cuda_host::Touch)));
            machine.buffers.push_back({given.begin, given.bytes, given.writable, touches});
        }
        cuda_host::run_blocks(launch->resident);
        for (const cuda_host::Buffer& buffer : machine.buffers) free(buffer.touches);
        machine.buffers.clear();
    }
    return machine.error.empty() ? nullptr : machine.error.c_str();
}
}
