// What Hopper does beside its threads: barriers that count arrivals and bytes, copies that such a barrier counts, and products
// of a warpgroup. Each takes effect as late as PTX allows: a copy when a thread waits for its barrier, a product when it is
// waited for.
//
// What a thread has done before it arrives at a barrier comes before what others do after they have waited for that phase: of
// the thread's warp, all up to its last barrier of the warp. `known` keeps it, a tick for each warp.
#include <algorithm>

#include "machine.h"
#include "tensor_map.h"

namespace cuda_host {

namespace {

// A row of shared memory that copies and products swizzle.
constexpr unsigned ROW = 128;
constexpr unsigned UNIT = 16;
constexpr unsigned TOKENS = 256, FEATURES = 16;

// Swizzled by 128 bytes: bits 4 to 6 of an address, by bits 7 to 9.
unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

void at_most(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// All that a thread knows to be over, to be passed on.
Known passed_on(const Fiber& fiber, bool with_own_tick) {
    Known known = fiber.known;
    const unsigned warp = fiber.thread / LANES;
    if (known.ticks.size() <= warp) known.ticks.resize(warp + 1, 0);
    known.ticks[warp] = std::max(known.ticks[warp], fiber.block->warps[warp].tick - (with_own_tick ? 0 : 1));
    return known;
}

Barrier& barrier_at(unsigned address, int line) {
    Block& block = *machine.current->block;
    access_shared(shared_pointer(address), 8, false, line);
    for (Barrier& barrier : block.barriers) {
        if (barrier.address == address) return barrier;
    }
    fail(name_of(*machine.current) + " uses a barrier that is none at line " + std::to_string(line));
    return block.barriers.front();
}

// Ends the phase if all have arrived and all bytes are under way, which are then there.
void settle(Barrier& barrier) {
    if (barrier.pending > 0) return;
    uint64_t bytes = 0;
    for (const Copy& copy : barrier.copies) bytes += copy.bytes;
    if (bytes > barrier.expected) return fail("more bytes than a barrier expects are copied");
    if (bytes < barrier.expected) return;
    if (bytes > 0) {
        const uint32_t tick = ++machine.last_tick;
        for (const Copy& copy : barrier.copies) arrive(copy, BULK, tick);
        barrier.arriving.copies = tick;
    }
    barrier.copies.clear();
    barrier.expected = 0;
    barrier.pending = barrier.count;
    barrier.phase += 1;
    barrier.ended = barrier.arriving;
}

void arrive_at(Barrier& barrier) {
    settle(barrier);
    if (barrier.pending == 0) return fail(name_of(*machine.current) + " arrives at a barrier that is full");
    barrier.pending -= 1;
    barrier.arriving.join(passed_on(*machine.current, false));
    if (barrier.copies.empty()) settle(barrier);
}

void start(Barrier& barrier, unsigned to, const unsigned char* from, bool valid, int line) {
    Fiber& fiber = *machine.current;
    if (!barrier.published) return fail(name_of(fiber) + " copies by a barrier that was not published at line " + std::to_string(line));
    auto* target = static_cast<unsigned char*>(shared_pointer(to));
    for (const Read& read : fiber.block->reads) {
        if (to < read.end && to + UNIT > read.begin && !is_over(fiber, read)) {
            return fail(name_of(fiber) + " copies over what a product reads at line " + std::to_string(line));
        }
    }
    barrier.copies.push_back(begin_copy(target, from, UNIT, valid ? UNIT : 0, line));
}

struct Together {
    Fiber* fiber;
};

void nothing(void* const*) {}

// d += a·b of a warp: 16 features, 256 tokens. Products are exact, and so nearly is their sum.
void multiply(void* const* lanes) {
    static double b[TOKENS][FEATURES];
    Fiber& first = *static_cast<Together*>(lanes[0])->fiber;
    for (size_t p = 0; p < first.products.size(); ++p) {
        const Product& product = first.products[p];
        double a[16][FEATURES];
        for (int lane = 0; lane < 32; ++lane) {
            const Fiber& fiber = *static_cast<Together*>(lanes[lane])->fiber;
            const Product& own = fiber.products[p];
            if (memcmp(own.a, own.values, sizeof(own.values)) != 0) {
                return fail(name_of(fiber) + " changes registers that a product of line " + std::to_string(own.line) + " reads");
            }
            for (int e = 0; e < 8; ++e) {
                const int row = lane / 4 + e / 2 % 2 * 8, column = lane % 4 * 2 + e % 2 + e / 4 * 8;
                a[row][column] = product.widen((unsigned short)(own.values[e / 2] >> e % 2 * 16));
            }
        }
        for (unsigned token = 0; token < TOKENS; ++token) {
            for (unsigned k = 0; k < FEATURES; ++k) {
                const unsigned address = swizzled(product.begin + token / 8 * product.stride + token % 8 * ROW + k * 2);
                b[token][k] = product.widen(*static_cast<const unsigned short*>(shared_pointer(address)));
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            Fiber& fiber = *static_cast<Together*>(lanes[lane])->fiber;
            for (unsigned i = 0; i < TOKENS / 8; ++i) {
                for (unsigned c = 0; c < 4; ++c) {
                    const unsigned row = (unsigned)lane / 4 + c / 2 * 8, token = i * 8 + (unsigned)lane % 4 * 2 + c % 2;
                    double sum = fiber.sums[i * 4 + c];
                    for (unsigned k = 0; k < FEATURES; ++k) sum += a[row][k] * b[token][k];
                    fiber.sums[i * 4 + c] = (float)sum;
                }
            }
        }
    }
    const unsigned warp = first.thread / LANES;
    for (Read& read : first.block->reads) {
        if (read.warp == warp && read.over == 0) read.over = first.block->warps[warp].tick;
    }
}

} // namespace

void Known::join(const Known& other) {
    at_most(ticks, other.ticks);
    copies = std::max(copies, other.copies);
}

// Whether a product's reading surely comes before what a thread does.
bool is_over(const Fiber& fiber, const Read& read) {
    if (read.over == 0) return false;
    const auto& ticks = fiber.known.ticks;
    return read.warp == fiber.thread / LANES || read.over < fiber.block->tick ||
           (read.warp < ticks.size() && read.over <= ticks[read.warp]);
}

// ---- barriers ----

void barrier_init(unsigned address, unsigned count, int line) {
    if (address % 8 != 0) fail("a barrier is not aligned at line " + std::to_string(line));
    access_shared(shared_pointer(address), 8, true, line);
    machine.current->block->barriers.push_back({address, count, count, 0, 0, false, {}, {}, {}});
}

void barrier_publish() {
    for (Barrier& barrier : machine.current->block->barriers) barrier.published = true;
}

void barrier_arrive(unsigned address, unsigned expected, int line) {
    Barrier& barrier = barrier_at(address, line);
    settle(barrier);
    barrier.expected += expected;
    arrive_at(barrier);
}

void barrier_wait(unsigned address, unsigned parity, int line) {
    Fiber& fiber = *machine.current;
    fiber.instruction = "mbarrier.try_wait";
    fiber.line = line;
    if (machine.order == Order::Random) yield(State::Ready);
    Barrier* barrier = &barrier_at(address, line);
    for (settle(*barrier); (barrier->phase & 1) == parity; settle(*barrier)) {
        yield(State::Spinning);
        barrier = &barrier_at(address, line);
    }
    fiber.known.join(barrier->ended);
}

// The first threads of a block, in whole warps.
void part_barrier(unsigned threads, int line) {
    Fiber* fiber = machine.current;
    fiber->instruction = "bar.sync";
    fiber->line = line;
    fiber->block->part = threads;
    yield(State::AtPartBarrier);
}

void release_part(Block* block) {
    Known known;
    for (unsigned i = 0; i < block->part; ++i) {
        const Fiber& fiber = *block->fibers[i];
        if (fiber.line != block->fibers[0]->line) return fail("a barrier of some warps diverges");
        known.join(passed_on(fiber, true));
    }
    const uint32_t tick = ++machine.last_tick;
    for (unsigned i = 0; i < block->part; ++i) {
        block->fibers[i]->known.join(known);
        block->warps[i / LANES].tick = tick;
    }
}

// ---- copies ----

void copy_bytes(unsigned to, const void* from, unsigned bytes, unsigned barrier, int line) {
    const auto* begin = static_cast<const unsigned char*>(from);
    if (to % UNIT != 0 || bytes % UNIT != 0 || reinterpret_cast<uintptr_t>(from) % UNIT != 0) {
        fail(name_of(*machine.current) + " copies with a wrong alignment or size at line " + std::to_string(line));
    }
    for (unsigned at = 0; at < bytes; at += UNIT) start(barrier_at(barrier, line), to + at, begin + at, true, line);
}

void copy_box(unsigned to, const void* map, unsigned column, unsigned row, unsigned barrier, int line) {
    HostTensorMap m;
    memcpy(&m, map, sizeof(m));
    if (m.mark != TENSOR_MAP_MARK) fail("no tensor map is copied from at line " + std::to_string(line));
    if (to % (8 * ROW) != 0 || m.wide * 2 != ROW) fail("a box does not lie as its swizzle needs at line " + std::to_string(line));
    for (unsigned r = 0; r < m.high; ++r) {
        for (unsigned c = 0; c < m.wide; c += UNIT / 2) {
            const bool valid = row + r < m.rows && column + c < m.columns;
            const auto* from = reinterpret_cast<const unsigned char*>(m.address + (row + r) * m.stride + (column + c) * 2);
            start(barrier_at(barrier, line), swizzled(to + r * ROW + c * 2), from, valid, line);
        }
    }
}

// ---- products of a warpgroup ----

void wgmma_fence() { machine.current->fenced = true; }

void wgmma(float* d, const unsigned* a, uint64_t descriptor, float (*widen)(unsigned short), int line) {
    Fiber& fiber = *machine.current;
    Block& block = *fiber.block;
    const unsigned warp = fiber.thread / LANES;
    const auto encoded = [descriptor](int bit) { return unsigned(descriptor >> bit & 0x3fff) * UNIT; };
    Product product = {a, {a[0], a[1], a[2], a[3]}, encoded(0), encoded(32), widen, line};
    if (!fiber.fenced) fail(name_of(fiber) + " multiplies without a fence at line " + std::to_string(line));
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor is not swizzled by 128 bytes");
    if (fiber.products.empty()) {
        fiber.sums.assign(d, d + TOKENS / 2);
        fiber.result = d;
        // Not there before the wait.
        std::fill(d, d + TOKENS / 2, NAN);
    }
    fiber.products.push_back(product);
    if (fiber.thread % LANES == 0) {
        const unsigned begin = product.begin / (8 * ROW) * (8 * ROW), end = begin + TOKENS / 8 * product.stride;
        for (unsigned token = 0; token < TOKENS; ++token) {
            for (unsigned unit = 0; unit < FEATURES * 2; unit += UNIT) {
                const unsigned at = swizzled(product.begin + token / 8 * product.stride + token % 8 * ROW + unit);
                require_written(shared_pointer(at), line);
            }
        }
        const auto same = [&](const Read& read) { return read.warp == warp && read.begin == begin; };
        const auto known = std::find_if(block.reads.begin(), block.reads.end(), same);
        if (known == block.reads.end()) {
            block.reads.push_back({begin, end, warp, 0});
        } else {
            known->over = 0;
        }
        // The four warps of a warpgroup multiply by the same operand, in the same order.
        auto& issued = block.issued[warp / 4];
        unsigned& at = block.warps[warp].products;
        if (at == issued.size()) issued.push_back(descriptor);
        if (issued[at++] != descriptor) fail("the warps of a warpgroup multiply by different operands");
    }
    Together own = {&fiber};
    together("wgmma", line, nothing, &own);
}

void wgmma_wait(int line) {
    Fiber& fiber = *machine.current;
    Together own = {&fiber};
    together("wgmma.wait_group", line, multiply, &own);
    if (!fiber.products.empty()) std::copy(fiber.sums.begin(), fiber.sums.end(), fiber.result);
    fiber.products.clear();
    fiber.fenced = false;
}

} // namespace cuda_host
