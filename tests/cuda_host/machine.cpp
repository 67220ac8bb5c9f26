// Fibers, and the order in which they run.
//
// A fiber runs until it needs others: at a barrier, or in an instruction that its warp executes together. Whether results
// depend on the order shows by running in another; what the order does not show, memory.cpp does.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>

namespace cuda_host {

Machine machine;

namespace {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr unsigned MOST_FIBERS = 8192;
// Rounds of nothing but waiting for another block's word, after which it will not come.
constexpr unsigned PATIENCE = 100;

void fiber_main() {
    for (;;) {
        machine.kernel->call(machine.arguments);
        if (!copies_are_over(*machine.current)) fail(name_of(*machine.current) + " ends with copies or products under way");
        yield(State::Done);
    }
}

Fiber* new_fiber() {
    if (machine.stacks == nullptr) {
        void* memory = mmap(nullptr, STACK_BYTES * MOST_FIBERS, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        machine.stacks = machine.stacks_end = static_cast<unsigned char*>(memory);
    }
    if (machine.stacks_end == machine.stacks + STACK_BYTES * MOST_FIBERS) return nullptr;
    Fiber* fiber = new Fiber();
    fiber->stack = machine.stacks_end;
    // Its lowest page is no memory: a stack that overflows ends there.
    mprotect(fiber->stack, 4096, PROT_NONE);
    machine.stacks_end += STACK_BYTES;
    return fiber;
}

void prepare(Fiber* fiber) {
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = STACK_BYTES;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    fiber->fresh = true;
}

void resume(Fiber* fiber) {
    machine.current = fiber;
    if (_setjmp(machine.here) == 0) {
        if (!fiber->fresh) _longjmp(fiber->here, 1);
        fiber->fresh = false;
        setcontext(&fiber->start);
    }
    machine.current = nullptr;
}

void set_ready(Fiber* fiber) {
    fiber->state = State::Ready;
    fiber->block->ready[fiber->thread / 64] |= uint64_t(1) << fiber->thread % 64;
}

// The next thread of a block to run, by the order of the launch; null when all of them wait.
Fiber* next_ready(Block* block) {
    const unsigned words = (unsigned)block->ready.size();
    if (machine.order == Order::Reverse) {
        for (unsigned w = words; w-- > 0;) {
            if (block->ready[w] != 0) return block->fibers[w * 64 + 63 - (unsigned)__builtin_clzll(block->ready[w])];
        }
        return nullptr;
    }
    unsigned first = 0;
    if (machine.order == Order::Random) {
        first = (unsigned)(next_random() % machine.thread_count);
        const uint64_t behind = block->ready[first / 64] >> first % 64;
        if (behind != 0) return block->fibers[first + (unsigned)__builtin_ctzll(behind)];
        first = first / 64 + 1;
    }
    for (unsigned i = 0; i < words; ++i) {
        const unsigned w = (first + i) % words;
        if (block->ready[w] != 0) return block->fibers[w * 64 + (unsigned)__builtin_ctzll(block->ready[w])];
    }
    return nullptr;
}

Block* start_block(unsigned number) {
    Block* block;
    if (machine.idle_blocks.empty()) {
        block = new Block();
    } else {
        block = machine.idle_blocks.back();
        machine.idle_blocks.pop_back();
    }
    block->number = number;
    block->index = {number % machine.grid.x, number / machine.grid.x % machine.grid.y,
                    number / machine.grid.x / machine.grid.y};
    block->tick = ++machine.last_tick;
    block->clock.assign(size_t(machine.grid.x) * machine.grid.y * machine.grid.z, 0);
    block->warps.assign(machine.thread_count / LANES, Warp{block->tick, 0, 0});
    block->ready.assign((machine.thread_count + 63) / 64, 0);
    block->waiting = block->done = block->part = block->part_waiting = 0;
    block->barriers.clear();
    block->reads.clear();
    for (auto& issued : block->issued) issued.clear();
    block->fibers.clear();
    for (unsigned thread = 0; thread < machine.thread_count; ++thread) {
        Fiber* fiber;
        if (!machine.idle.empty()) {
            fiber = machine.idle.back();
            machine.idle.pop_back();
        } else if ((fiber = new_fiber()) != nullptr) {
            prepare(fiber);
        } else {
            fail("there are too many threads at once");
            break;
        }
        fiber->block = block;
        fiber->thread = thread;
        fiber->index = {thread % machine.threads.x, thread / machine.threads.x, 0};
        fiber->open.clear();
        fiber->groups.clear();
        fiber->seen.clear();
        fiber->unfenced.clear();
        fiber->published.clear();
        fiber->known = {};
        fiber->products.clear();
        fiber->fenced = false;
        block->fibers.push_back(fiber);
        set_ready(fiber);
    }
    poison(block);
    return block;
}

void end_block(Block* block) {
    for (const Barrier& barrier : block->barriers) {
        if (!barrier.copies.empty()) fail("block " + std::to_string(block->number) + " ends with copies that nothing waits for");
    }
    machine.idle.insert(machine.idle.end(), block->fibers.rbegin(), block->fibers.rend());
    machine.idle_blocks.push_back(block);
    if (machine.installed == block) machine.installed = nullptr;
}

// What the threads of a block wait in, and where.
std::string where_all_are(const Block* block) {
    std::map<std::string, std::vector<unsigned>> places;
    for (const Fiber* fiber : block->fibers) {
        std::string place = fiber->state == State::Done    ? "ended"
                            : fiber->state == State::Ready ? "can run"
                                                           : std::string("in ") + fiber->instruction + " of line " +
                                                                 std::to_string(fiber->line);
        places[place].push_back(fiber->thread);
    }
    std::string text = "block " + std::to_string(block->number) + ":";
    for (const auto& [place, threads] : places) {
        text += " threads";
        for (size_t i = 0; i < threads.size(); ++i) {
            size_t last = i;
            while (last + 1 < threads.size() && threads[last + 1] == threads[last] + 1) ++last;
            text += " " + std::to_string(threads[i]);
            if (last > i) text += "-" + std::to_string(threads[last]);
            i = last;
        }
        text += " " + place + ";";
    }
    text.pop_back();
    return text;
}

void release_block(Block* block) {
    for (const Fiber* fiber : block->fibers) {
        if (fiber->line != block->fibers[0]->line) return fail("a barrier diverges, " + where_all_are(block));
    }
    for (Fiber* fiber : block->fibers) {
        join(block->clock, fiber->seen);
        fiber->seen.clear();
        set_ready(fiber);
    }
    block->waiting = 0;
    block->tick = ++machine.last_tick;
    for (Warp& warp : block->warps) warp.tick = block->tick;
}

void release_warp(Block* block, unsigned number) {
    Fiber* const* lanes = &block->fibers[number * LANES];
    void* own[LANES];
    for (unsigned lane = 0; lane < LANES; ++lane) {
        if (lanes[lane]->run != lanes[0]->run || lanes[lane]->line != lanes[0]->line) {
            return fail("a warp diverges, " + where_all_are(block));
        }
        own[lane] = lanes[lane]->own;
    }
    if (lanes[0]->run != nullptr) {
        lanes[0]->run(own);
    } else {
        block->warps[number].tick = ++machine.last_tick;
    }
    for (unsigned lane = 0; lane < LANES; ++lane) set_ready(lanes[lane]);
    block->warps[number].waiting = 0;
}

// Runs one thread until it waits. False when no thread of the block can run.
bool advance(Block* block) {
    Fiber* fiber = next_ready(block);
    if (fiber == nullptr) return false;
    install(block);
    block->ready[fiber->thread / 64] &= ~(uint64_t(1) << fiber->thread % 64);
    resume(fiber);
    if (!machine.error.empty()) return true;
    machine.advances += fiber->state != State::Spinning;
    switch (fiber->state) {
    case State::Ready: set_ready(fiber); break;
    case State::Spinning: break;
    case State::Done: ++block->done; break;
    case State::AtBlockBarrier:
        if (++block->waiting == machine.thread_count) release_block(block);
        break;
    case State::AtPartBarrier:
        if (++block->part_waiting == block->part) {
            release_part(block);
            block->part_waiting = 0;
            for (unsigned i = 0; i < block->part; ++i) set_ready(block->fibers[i]);
        }
        break;
    case State::Together:
        if (++block->warps[fiber->thread / LANES].waiting == LANES) release_warp(block, fiber->thread / LANES);
        break;
    }
    return true;
}

// Lets those who wait for another block's word look again. False when nobody does.
bool look_again() {
    bool any = false;
    for (Block* block : machine.resident) {
        for (Fiber* fiber : block->fibers) {
            if (fiber->state == State::Spinning) set_ready(fiber), any = true;
        }
    }
    return any;
}

} // namespace

uint64_t next_random() { // splitmix64
    uint64_t z = machine.random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void yield(State state) {
    Fiber* fiber = machine.current;
    fiber->state = state;
    if (_setjmp(fiber->here) == 0) _longjmp(machine.here, 1);
}

void fail(const std::string& what) {
    if (machine.error.empty()) machine.error = what;
    if (machine.current != nullptr) yield(State::Done);
}

std::string name_of(const Fiber& fiber) {
    return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.block->number);
}

// Runs all blocks of the grid, up to `resident` of them at once.
void run_blocks(unsigned resident) {
    const unsigned blocks = machine.grid.x * machine.grid.y * machine.grid.z;
    std::vector<unsigned> waiting(blocks); // the next is the last
    for (unsigned i = 0; i < blocks; ++i) waiting[i] = machine.order == Order::Reverse ? i : blocks - 1 - i;
    if (machine.order == Order::Random) {
        for (unsigned i = blocks; i > 1; --i) std::swap(waiting[i - 1], waiting[next_random() % i]);
    }
    unsigned in_vain = 0;
    size_t at = 0;
    while (machine.error.empty()) {
        for (size_t i = machine.resident.size(); i-- > 0;) {
            if (machine.resident[i]->done < machine.thread_count) continue;
            end_block(machine.resident[i]);
            machine.resident.erase(machine.resident.begin() + (long)i);
        }
        while (machine.resident.size() < resident && !waiting.empty() && machine.error.empty()) {
            machine.resident.push_back(start_block(waiting.back()));
            waiting.pop_back();
        }
        if (machine.resident.empty() || !machine.error.empty()) break;

        // A block runs until it waits, then the next one; at random, some threads of any.
        bool advanced = false;
        for (size_t tried = 0; tried < machine.resident.size() && !advanced; ++tried) {
            Block* block = machine.resident[(at + tried) % machine.resident.size()];
            unsigned turns = machine.order == Order::Random ? 1 + (unsigned)(next_random() % 512) : ~0u;
            const uint64_t before = machine.advances;
            while (turns-- > 0 && machine.error.empty() && advance(block)) {
            }
            advanced = machine.advances != before;
        }
        at = machine.order == Order::Random ? next_random() % machine.resident.size() : at + 1;
        if (!machine.error.empty()) break;
        if (advanced) {
            in_vain = 0;
        } else if (std::all_of(machine.resident.begin(), machine.resident.end(),
                               [](const Block* b) { return b->done == machine.thread_count; })) {
            continue;
        } else if (!look_again() || ++in_vain > PATIENCE) {
            std::string text = "the threads wait for ever";
            for (const Block* block : machine.resident) text += ", " + where_all_are(block);
            fail(text);
        }
    }
    if (!machine.error.empty()) {
        // Its threads are not where a new launch begins.
        for (Block* block : machine.resident) {
            for (Fiber* fiber : block->fibers) prepare(fiber);
            forget_touches(block);
            end_block(block);
        }
        machine.resident.clear();
    }
}

// ---- what kernels call ----

uint3 thread_index() { return machine.current->index; }
uint3 block_index() { return machine.current->block->index; }
uint3 grid_size() { return machine.grid; }

void together(const char* instruction, int line, void (*run)(void* const* lanes), void* own) {
    Fiber* fiber = machine.current;
    fiber->instruction = instruction;
    fiber->line = line;
    fiber->run = run;
    fiber->own = own;
    yield(State::Together);
}

void warp_barrier(int line) { together("__syncwarp", line, nullptr, nullptr); }

void block_barrier(int line) {
    Fiber* fiber = machine.current;
    fiber->instruction = "__syncthreads";
    fiber->line = line;
    yield(State::AtBlockBarrier);
}

} // namespace cuda_host
