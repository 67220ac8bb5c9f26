// Shared and device memory: every access is checked for its bounds, and for a race with what other threads did.
//
// Threads of a block are ordered by __syncthreads, lanes of a warp by __syncwarp too, blocks by what PTX's memory model
// orders: a fence, then an atomic that another thread reads, then a fence or an acquiring load there. Two accesses to a byte,
// one of them a write, that nothing orders are a race, whatever the order in which they happened to run.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace cuda_host {

namespace {

// Whoever touched a byte: 16 bits of block, 8 of warp, 8 of lane; all ones where there were several.
constexpr uint32_t MANY_LANES = 0xff, MANY_WARPS = 0xff00, MANY_BLOCKS = 0xffff0000;
// A writer that is a copy under way; no block has this number.
constexpr uint32_t COPY = 0xfffe0000;

// A thread where it is now.
struct Now {
    const Fiber& fiber;
    uint32_t who, tick, block_tick;

    explicit Now(const Fiber& fiber)
        : fiber(fiber), who(fiber.block->number << 16 | (fiber.thread / LANES) << 8 | fiber.thread % LANES),
          tick(fiber.block->warps[fiber.thread / LANES].tick), block_tick(fiber.block->tick) {}

    // Whether all that `other` stands for surely comes before what this thread does.
    bool comes_after(uint32_t other, uint32_t other_tick, bool is_shared) const {
        if (other_tick == 0 || other == who) return true;
        if (!is_shared && (other ^ who) & MANY_BLOCKS) {
            if ((other & MANY_BLOCKS) == MANY_BLOCKS) return false;
            const uint32_t block = other >> 16;
            return other_tick <= fiber.block->clock[block] ||
                   (!fiber.seen.empty() && other_tick <= fiber.seen[block]);
        }
        if (other_tick < block_tick) return true;
        if (other == BULK) return other_tick <= fiber.known.copies;
        const uint32_t warp = other >> 8 & 0xff;
        if (warp < fiber.known.ticks.size() && other_tick <= fiber.known.ticks[warp]) return true;
        return (other & MANY_WARPS) == (who & MANY_WARPS) && other_tick < tick;
    }
};

std::string in_words(uint32_t other) {
    std::string text;
    if (other == BULK) return "a copy";
    if ((other & MANY_LANES) == MANY_LANES || (other & MANY_WARPS) == MANY_WARPS) {
        text = "several threads";
    } else {
        text = "thread " + std::to_string((other >> 8 & 0xff) * LANES + (other & 0xff));
    }
    return (other & MANY_BLOCKS) == MANY_BLOCKS ? "several blocks" : text + " of block " + std::to_string(other >> 16);
}

std::string place_of(const void* place, int line) {
    if (place == nullptr) return " at line " + std::to_string(line);
    char text[32]; // an offset in the library, which its caller looks up
    snprintf(text, sizeof(text), " at [%#zx]", size_t(static_cast<const unsigned char*>(place) - machine.constants));
    return text;
}

Buffer* buffer_of(const unsigned char* at, unsigned bytes) {
    for (Buffer& buffer : machine.buffers) {
        if (at >= buffer.begin && at < buffer.begin + buffer.bytes) {
            return at + bytes <= buffer.begin + buffer.bytes ? &buffer : nullptr;
        }
    }
    return nullptr;
}

bool is_word(const unsigned char* at) {
    return std::any_of(machine.words.begin(), machine.words.end(), [at](const auto& word) {
        const auto* begin = reinterpret_cast<const unsigned char*>(word.first);
        return at >= begin && at < begin + sizeof(unsigned);
    });
}

struct Place {
    const void* code; // or
    int line;
};

void touch(Touch* touches, unsigned bytes, bool writes, bool is_shared, const unsigned char* at, Place place) {
    const Now now(*machine.current);
    const auto race = [&](const char* does, const char* did, uint32_t other) {
        fail("race: " + name_of(now.fiber) + does + (is_shared ? "shared memory" : "device memory") +
             place_of(place.code, place.line) + " that " + in_words(other) + did + ", and nothing orders the two");
    };
    if (is_shared && writes) {
        const unsigned begin = shared_address(at);
        for (const Read& read : now.fiber.block->reads) {
            if (begin < read.end && begin + bytes > read.begin && !is_over(now.fiber, read)) {
                return race(" writes ", " reads by a product", now.fiber.block->number << 16 | read.warp << 8);
            }
        }
    }
    for (unsigned i = 0; i < bytes; ++i) {
        Touch& last = touches[i];
        if (is_shared && last.writer == COPY && last.write_tick != 0) {
            return fail(name_of(now.fiber) + " touches shared memory" + place_of(place.code, place.line) +
                        " while an asynchronous copy to it is under way");
        }
        if (!now.comes_after(last.writer, last.write_tick, is_shared) && (is_shared || !is_word(at + i))) {
            return race(writes ? " writes " : " reads ", " has written", last.writer);
        }
        if (writes) {
            if (!now.comes_after(last.reader, last.read_tick, is_shared) && (is_shared || !is_word(at + i))) {
                return race(" writes ", " has read", last.reader);
            }
            last.writer = now.who;
            last.write_tick = now.tick;
        } else if (now.comes_after(last.reader, last.read_tick, is_shared)) {
            last.reader = now.who;
            last.read_tick = now.tick;
        } else {
            const uint32_t others = last.reader ^ now.who;
            if (!is_shared && others & MANY_BLOCKS) last.reader |= MANY_BLOCKS | MANY_WARPS | MANY_LANES;
            if (others & MANY_WARPS) last.reader |= MANY_WARPS | MANY_LANES;
            if (others & MANY_LANES) last.reader |= MANY_LANES;
            last.read_tick = std::max(last.read_tick, now.tick);
        }
    }
}

void check(const void* pointer, unsigned bytes, bool writes, Place place) {
    const auto* at = static_cast<const unsigned char*>(pointer);
    if (at >= machine.stacks && at < machine.stacks_end) return;
    if (machine.current == nullptr) return;
    const auto refuse = [&](const char* what) {
        char text[128];
        snprintf(text, sizeof(text), " %s %u bytes %s", writes ? "writes" : "reads", bytes, what);
        fail(name_of(*machine.current) + text + place_of(place.code, place.line));
    };
    if (at >= machine.shared && at < machine.shared_end) {
        if (at + bytes > machine.dynamic + machine.dynamic_bytes && at < machine.dynamic + DYNAMIC_BYTES) {
            return refuse("beyond its dynamic shared memory");
        }
        return touch(machine.current->block->touches + (at - machine.shared), bytes, writes, true, at, place);
    }
    if (machine.buffers.empty()) return; // the caller does not know them
    if (Buffer* buffer = buffer_of(at, bytes)) {
        if (writes && !buffer->writable) return refuse("of memory that it is given to read");
        return touch(buffer->touches + (at - buffer->begin), bytes, writes, false, at, place);
    }
    if (!writes && at >= machine.constants && at + bytes <= machine.constants_end) return;
    refuse("outside of all memory that it is given");
}

} // namespace

void join(Clock& to, const Clock& from) {
    if (from.empty()) return;
    if (to.empty()) to.assign(from.size(), 0);
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void access(const void* at, unsigned bytes, bool writes, const void* place) { check(at, bytes, writes, {place, 0}); }

// The thread-local segment of this library, as this thread of the process has it, and its constants.
void find_memory() {
    machine.dynamic = library.dynamic(); // makes it exist
    const auto find = [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            auto* begin = segment.p_type == PT_TLS ? static_cast<unsigned char*>(info->dlpi_tls_data)
                                                   : reinterpret_cast<unsigned char*>(info->dlpi_addr + segment.p_vaddr);
            auto* end = begin + segment.p_memsz;
            if (segment.p_type == PT_TLS && begin <= machine.dynamic && machine.dynamic < end) {
                machine.shared = begin, machine.shared_end = end;
            }
            const auto* here = reinterpret_cast<const unsigned char*>(&library);
            if (segment.p_type == PT_LOAD && begin <= here && here < end) {
                machine.constants = reinterpret_cast<unsigned char*>(info->dlpi_addr);
                machine.constants_end = end;
            }
        }
        return 0;
    };
    dl_iterate_phdr(find, nullptr);
}

// ---- shared memory of blocks ----

namespace {

// The parts of shared memory that are in use: all but the dynamic part beyond what the launch asks for.
template <typename Visit>
void in_use(Visit visit) {
    visit(machine.shared, machine.dynamic + machine.dynamic_bytes);
    visit(machine.dynamic + DYNAMIC_BYTES, machine.shared_end);
}

} // namespace

// What is never written is NaN, in fp32 and fp16, and code 255.
void poison(Block* block) {
    const size_t bytes = size_t(machine.shared_end - machine.shared);
    if (block->touches == nullptr) {
        block->touches = static_cast<Touch*>(calloc(bytes, sizeof(Touch)));
        block->shared.resize(bytes);
    }
    in_use([&](unsigned char* from, unsigned char* to) {
        memset(block->shared.data() + (from - machine.shared), 0xff, size_t(to - from));
    });
}

void install(Block* block) {
    if (machine.installed == block) return;
    in_use([&](unsigned char* from, unsigned char* to) {
        const size_t at = size_t(from - machine.shared), bytes = size_t(to - from);
        if (machine.installed != nullptr) memcpy(machine.installed->shared.data() + at, from, bytes);
        memcpy(from, block->shared.data() + at, bytes);
    });
    machine.installed = block;
}

void forget_touches(Block* block) {
    free(block->touches);
    block->touches = nullptr;
}

unsigned shared_address(const void* pointer) {
    const auto* at = static_cast<const unsigned char*>(pointer);
    // Not 0, and as aligned as the memory itself.
    return (unsigned)(at - machine.shared) + 4096;
}
void* shared_pointer(unsigned address) { return machine.shared + address - 4096; }

// ---- asynchronous copies ----

Copy begin_copy(unsigned char* to, const unsigned char* from, unsigned bytes, unsigned valid, int line) {
    Copy copy = {to, from, bytes, valid, line, {}};
    if (valid > 0) {
        check(from, valid, false, {nullptr, line});
        memcpy(copy.value, from, valid);
    }
    check(to, bytes, true, {nullptr, line});
    Touch* touches = machine.current->block->touches + (to - machine.shared);
    for (unsigned i = 0; i < bytes; ++i) touches[i].writer = COPY;
    return copy;
}

void arrive(const Copy& copy, uint32_t writer, uint32_t tick) {
    if (copy.valid > 0) {
        check(copy.from, copy.valid, false, {nullptr, copy.line});
        if (memcmp(copy.value, copy.from, copy.valid) != 0) {
            return fail("what is copied at line " + std::to_string(copy.line) + " changes meanwhile");
        }
    }
    memcpy(copy.to, copy.value, copy.bytes);
    Touch* touches = machine.current->block->touches + (copy.to - machine.shared);
    for (unsigned i = 0; i < copy.bytes; ++i) touches[i].writer = writer, touches[i].write_tick = tick;
}

void access_shared(const void* at, unsigned bytes, bool writes, int line) { check(at, bytes, writes, {nullptr, line}); }

void require_written(const void* pointer, int line) {
    const Now now(*machine.current);
    const auto* at = static_cast<const unsigned char*>(pointer);
    const bool inside = at >= machine.dynamic && at < machine.dynamic + machine.dynamic_bytes;
    const Touch* touch = inside ? now.fiber.block->touches + (at - machine.shared) : nullptr;
    if (touch == nullptr || touch->write_tick == 0 || touch->writer == COPY || !now.comes_after(touch->writer, touch->write_tick, true)) {
        fail(name_of(now.fiber) + " multiplies by what is not there yet at line " + std::to_string(line));
    }
}

void copy_async(void* to, const void* from, unsigned bytes, unsigned valid, int line) {
    Fiber& fiber = *machine.current;
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (reinterpret_cast<uintptr_t>(from) % bytes != 0) || valid > bytes) {
        return fail(name_of(fiber) + " copies with a wrong alignment or size at line " + std::to_string(line));
    }
    if (to < machine.shared || to >= machine.shared_end) {
        return fail(name_of(fiber) + " copies to what is not shared memory at line " + std::to_string(line));
    }
    fiber.open.push_back(begin_copy(static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, valid, line));
}

void commit_copies() {
    machine.current->groups.push_back(std::move(machine.current->open));
    machine.current->open.clear();
}

// Copies arrive when they must, not before.
void wait_for_copies(unsigned pending) {
    Fiber& fiber = *machine.current;
    while (fiber.groups.size() > pending) {
        const Now now(fiber);
        for (const Copy& copy : fiber.groups.front()) arrive(copy, now.who, now.tick);
        fiber.groups.pop_front();
    }
}

bool copies_are_over(const Fiber& fiber) {
    return fiber.open.empty() && fiber.products.empty() && std::all_of(fiber.groups.begin(), fiber.groups.end(),
                                             [](const auto& group) { return group.empty(); });
}

// ---- between blocks ----

namespace {

Clock& published_at(unsigned* word) {
    for (auto& [at, clock] : machine.words) {
        if (at == word) return clock;
    }
    machine.words.emplace_back(word, Clock(machine.current->block->clock.size(), 0));
    return machine.words.back().second;
}

} // namespace

// What this thread knows to be over is published by its next atomics; what it has read by atomics, it knows from now on.
void fence() {
    Fiber& fiber = *machine.current;
    join(fiber.seen, fiber.unfenced);
    fiber.unfenced.clear();
    fiber.published = fiber.block->clock;
    join(fiber.published, fiber.seen);
    // Of its own block, what came before the last barrier.
    fiber.published[fiber.block->number] = fiber.block->tick - 1;
    if (machine.order == Order::Random) yield(State::Ready);
}

unsigned add_atomically(unsigned* to, unsigned value) {
    if (machine.order == Order::Random) yield(State::Ready);
    if (!machine.buffers.empty()) {
        Buffer* buffer = buffer_of(reinterpret_cast<unsigned char*>(to), sizeof(*to));
        if (buffer == nullptr || !buffer->writable) {
            fail(name_of(*machine.current) + " changes a word outside of all memory that it is given");
        }
    }
    Clock& clock = published_at(to);
    join(machine.current->unfenced, clock);
    join(clock, machine.current->published);
    const unsigned before = *to;
    *to += value;
    return before;
}

unsigned load_acquire(const unsigned* from) {
    yield(State::Spinning);
    if (!machine.buffers.empty() && buffer_of(reinterpret_cast<const unsigned char*>(from), sizeof(*from)) == nullptr) {
        fail(name_of(*machine.current) + " reads a word outside of all memory that it is given");
    }
    join(machine.current->seen, published_at(const_cast<unsigned*>(from)));
    return *from;
}

} // namespace cuda_host

// ---- the compiler's hooks ----

#define PLACE __builtin_return_address(0)
#define HOOKS(BYTES)                                                                                                   \
    void __tsan_read##BYTES(void* at) { cuda_host::access(at, BYTES, false, PLACE); }                                  \
    void __tsan_write##BYTES(void* at) { cuda_host::access(at, BYTES, true, PLACE); }                                  \
    void __tsan_unaligned_read##BYTES(void* at) { cuda_host::access(at, BYTES, false, PLACE); }                        \
    void __tsan_unaligned_write##BYTES(void* at) { cuda_host::access(at, BYTES, true, PLACE); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, unsigned long bytes) { cuda_host::access(at, (unsigned)bytes, false, PLACE); }
void __tsan_write_range(void* at, unsigned long bytes) { cuda_host::access(at, (unsigned)bytes, true, PLACE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
