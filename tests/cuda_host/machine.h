// A machine that runs blocks of threads as fibers of one thread of this process. Its parts: machine.cpp (fibers, barriers,
// order), memory.cpp (who may touch what, when), asynchronous.cpp (what runs beside the threads), launch.cpp (what Rust calls).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda_host.h"

namespace cuda_host {

constexpr unsigned LANES = 32;
constexpr unsigned MOST_THREADS = 1024;

// A block's accesses that others may rely on: `clock[b]` is the last tick of block b that is surely over and seen.
using Clock = std::vector<uint32_t>;

// An asynchronous copy that nobody has waited for.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes, valid;
    int line;
    unsigned char value[16];
};

struct Block;

enum class State { Ready, AtBlockBarrier, AtPartBarrier, Together, Spinning, Done };

// What a thread knows to be over in its block, beyond what came before the last barrier of all: of each warp, accesses up to a
// tick; of copies that a barrier counts, those up to a tick.
struct Known {
    std::vector<uint32_t> ticks;
    uint32_t copies = 0;
    void join(const Known& other);
};

// A barrier that counts arrivals and bytes.
struct Barrier {
    unsigned address, count, pending;
    uint64_t expected; // bytes
    uint32_t phase;
    bool published; // to the engine that copies
    std::vector<Copy> copies;
    Known arriving, ended; // of those who have arrived in all phases, and in those that have ended
};

// A product of a warpgroup that has not been waited for.
struct Product {
    const unsigned* a;
    unsigned values[4]; // of a
    unsigned begin, stride; // of the other operand, in shared memory
    float (*widen)(unsigned short);
    int line;
};

// Shared memory that products of a warp read.
struct Read {
    unsigned begin, end, warp;
    uint32_t over; // tick; 0: under way
};

struct Fiber {
    // The machine's.
    jmp_buf here;
    ucontext_t start;
    unsigned char* stack;
    bool fresh; // not started
    State state;
    // While it waits: in what, where in the text, and what it brought.
    const char* instruction;
    int line;
    void (*run)(void* const* lanes);
    void* own;
    // The kernel's.
    Block* block;
    unsigned thread;
    uint3 index;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    // What other blocks have published to this thread, beyond what its block knows (`seen`), what it read without an
    // acquiring fence yet (`unfenced`), and what its last fence publishes. Empty: nothing.
    Clock seen, unfenced, published;
    Known known;
    std::vector<Product> products;
    std::vector<float> sums; // of the products, which its registers `result` get
    float* result;
    bool fenced;
};

// Who touched a byte last. A tick is unique to a block between two of its barriers, or to a warp between two of its own.
struct Touch {
    uint32_t write_tick, read_tick; // 0: never
    uint32_t writer, reader;        // packed by `who`
};

struct Warp {
    uint32_t tick;
    unsigned waiting, products;
};

struct Block {
    unsigned number; // along the grid
    uint3 index;
    uint32_t tick; // since the last barrier
    Clock clock;
    std::vector<Warp> warps;
    std::vector<uint64_t> ready; // a bit a thread
    unsigned waiting, done, part, part_waiting;
    std::vector<Barrier> barriers;
    std::vector<Read> reads;
    std::vector<uint64_t> issued[MOST_THREADS / LANES / 4]; // descriptors of each warpgroup's products
    std::vector<Fiber*> fibers;
    std::vector<unsigned char> shared; // its shared memory while another block runs
    Touch* touches;                    // one for each byte of it
};

// Device memory that a launch may touch.
struct Buffer {
    unsigned char* begin;
    uint64_t bytes;
    uint32_t writable;
    Touch* touches;
};

enum class Order : uint32_t { Forward, Reverse, Random };

struct Machine {
    // The launch.
    const Kernel* kernel;
    void* const* arguments;
    uint3 grid, threads;
    unsigned thread_count, dynamic_bytes;
    Order order;
    uint64_t random;
    std::vector<Buffer> buffers;
    // Words that were changed by atomics: other accesses to them do not race.
    std::vector<std::pair<unsigned*, Clock>> words;
    // Its state.
    Fiber* current;   // null: the machine itself runs
    Block* installed; // whose shared memory is in place
    std::vector<Block*> resident;
    uint32_t last_tick;
    uint64_t advances; // runs of a thread that did more than look for another block's word
    jmp_buf here;
    std::string error;
    // Kept between launches.
    std::vector<Fiber*> idle;
    std::vector<Block*> idle_blocks;
    unsigned char *stacks, *stacks_end;
    unsigned char *shared, *shared_end;  // all that is thread-local
    unsigned char *dynamic;              // and the part of it that `extern __shared__` names
    unsigned char *constants, *constants_end;
};
extern Machine machine;

// machine.cpp
void run_blocks(unsigned resident);
// Ends the launch. Returns only when the machine itself runs.
void fail(const std::string& what);
// "thread 33 of block 2".
std::string name_of(const Fiber& fiber);
uint64_t next_random();
void yield(State state);

// memory.cpp
void find_memory();
void install(Block* block);
void poison(Block* block);
void forget_touches(Block* block);
void join(Clock& to, const Clock& from);
bool copies_are_over(const Fiber& fiber);
// A writer that is a copy which a barrier counts, once it has arrived.
constexpr uint32_t BULK = 0xfffd0000;
// Checks both sides of a copy to shared memory, and marks its destination.
Copy begin_copy(unsigned char* to, const unsigned char* from, unsigned bytes, unsigned valid, int line);
// Lets a copy arrive.
void arrive(const Copy& copy, uint32_t writer, uint32_t tick);
void access_shared(const void* at, unsigned bytes, bool writes, int line);
// That this thread may read what was written there.
void require_written(const void* at, int line);

// asynchronous.cpp
bool is_over(const Fiber& fiber, const Read& read);
void release_part(Block* block);

// Checks an access and remembers it. `place` is an address of code.
void access(const void* at, unsigned bytes, bool writes, const void* place);

} // namespace cuda_host
