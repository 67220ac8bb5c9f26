// y[M,N] = x[M,K] · dequant(W)ᵀ for 4- and 8-bit GPTQ weights, fp16 or bf16 in and out, fp32 accumulation.
//
// Compiled by NVRTC for sm_80 and later; includes nothing. The layout of weights and parameters is that of
// kernels/cuda/layout.rs, whose functions have the names of those here; kernels/cuda/plan.rs chooses the configuration
// and the launches.
//
// Configuration, by -D:
//   BITS          4 or 8
//   BF16          0: x and y are fp16; 1: bf16. Scales are fp16 in both, as in the checkpoint.
//   ZEROS         0: symmetric, zero point 2^(BITS-1); 1: explicit zero points
//   GROUP_TILES   16-feature tiles that surely share a group: 4 when the group size is a multiple of 64 (or all of
//                 K), 2 for another multiple of 32, 1 for another multiple of 16
//   FEW_STRIPS    16-feature strips of output a block of `few` works on: 1, 2, 4 or 8
//   FEW_STAGES    units of weights each warp of `few` keeps in flight
//   MANY_STAGES   chunks a block of `many` keeps in flight (at least 3)
//   PDL           1: built for launches with programmatic stream serialization (sm_90 and later)
//   WGMMA         1: only int4_matmul_wgmma_256, which only compute capability 9.0 (sm_90a) runs
//
// Letters: M tokens, N output features, K input features, G groups. A *strip* is 16 output features, a *tile* 16 input
// features, a *chunk* 64 input features; one strip by one tile is one A operand of mma.m16n8k16 and each lane holds its
// 8 codes in BITS/4 adjacent words. Weights are the A operand (features are the m16 side), tokens the n8 side, so
// that few tokens waste little. Formats, in order of the arguments:
//   weights  [N/16, K/64, 64*BITS*16/8 bytes], N padded to 128 and K to 64, see weight_offset and word_offset
//   params   [N/16, G', 16 or 32 u16]: 16 fp16 scales, then with ZEROS 16 zero points as integers; row pairs (r, r+8)
//            share a word. G' = ceil(padded K / group): groups in the padding have scale 0.
// With act order the weights' features are sorted by group at load; `perm[j]` names the feature of x at position j.
//
// The mapping of values to lanes is that of the PTX ISA's section on mma.m16n8k16; the magic-number conversion of codes
// is the published idea of FasterTransformer's int4 converters, and holding weights in operand order with a per-warp
// pipeline that of Marlin (arXiv 2408.11743); the work split is stream-K (arXiv 2301.03598). All code here is our own.
//
// docs/kernels.md has the registers that each kernel takes; none spills. Dynamic shared memory is `shared_bytes` of
// kernels/cuda/plan.rs; few has 4 static bytes more.

#ifndef BITS
#define BITS 4
#endif
#ifndef BF16
#define BF16 0
#endif
#ifndef ZEROS
#define ZEROS 0
#endif
#ifndef GROUP_TILES
#define GROUP_TILES 4
#endif
#ifndef FEW_STRIPS
#define FEW_STRIPS (BITS == 4 ? 8 : 4)
#endif
#ifndef FEW_STAGES
#define FEW_STAGES 3
#endif
#ifndef MANY_STAGES
#define MANY_STAGES 4
#endif
#ifndef PDL
#define PDL 0
#endif
#ifndef WGMMA
#define WGMMA 0
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 STRIP = 16;
constexpr u32 TILE = 16;
constexpr u32 CHUNK = 64;
constexpr u32 TILES = CHUNK / TILE;
constexpr u32 WORDS = BITS / 4;                       // words of one lane in one tile
constexpr u32 CHUNK_BYTES = STRIP * CHUNK * BITS / 8; // of one strip
constexpr u32 PARTS = TILES / GROUP_TILES;            // of a chunk, each within one group
constexpr u32 PARAM_BYTES = ZEROS ? 64 : 32;          // of one strip in one group
constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;

static_assert(BITS == 4 || BITS == 8, "codes of 4 or 8 bits");
static_assert(GROUP_TILES == 1 || GROUP_TILES == 2 || GROUP_TILES == 4, "parts of a chunk");

// ---- Layout: mirrored in kernels/cuda/layout.rs ------------------------------------------------------------------

// Bytes before the chunk of a strip.
__device__ __forceinline__ u64 weight_offset(u32 strip, u32 chunk, u32 chunks) {
    return (u64(strip) * chunks + chunk) * CHUNK_BYTES;
}

// Bytes, within a chunk of a strip, before the words of a lane in a tile. A lane's 16 adjacent bytes are four tiles at
// 4 bits and two at 8, so both are read 16 bytes a lane and without bank conflicts.
__device__ __forceinline__ u32 word_offset(u32 tile, u32 lane) {
    return BITS == 4 ? lane * 16 + tile * 4 : tile / 2 * 512 + lane * 16 + tile % 2 * 8;
}

// Bytes before the parameters of a strip in a group.
__device__ __forceinline__ u64 param_offset(u32 strip, u32 group, u32 groups) {
    return (u64(strip) * groups + group) * PARAM_BYTES;
}

// Bytes, within a tile of tokens in shared memory, before a 16-byte piece (8 features) of a token. Rows are 128 bytes;
// the exclusive or spreads the same piece of 8 adjacent tokens over all banks.
__device__ __forceinline__ u32 token_offset(u32 token, u32 piece) { return token * 128 + ((piece ^ (token & 7)) * 16); }

// The token and piece whose row a lane names to ldmatrix.x4, to get the B operands of two adjacent tiles.
__device__ __forceinline__ u32 two_tiles_token(u32 lane) { return lane % 8; }
__device__ __forceinline__ u32 two_tiles_piece(u32 tile, u32 lane) { return tile * 2 + lane / 8; }

// The same for the B operands of one tile for two adjacent blocks of 8 tokens.
__device__ __forceinline__ u32 two_blocks_token(u32 lane) { return lane / 16 * 8 + lane % 8; }
__device__ __forceinline__ u32 two_blocks_piece(u32 tile, u32 lane) { return tile * 2 + lane / 8 % 2; }

// Output feature (in a strip) and token (in a block of 8) of accumulator c = 0..3 of a lane.
__device__ __forceinline__ u32 accumulator_feature(u32 lane, u32 c) { return lane / 4 + c / 2 * 8; }
__device__ __forceinline__ u32 accumulator_token(u32 lane, u32 c) { return lane % 4 * 2 + c % 2; }

// The first unit of a block when `units` are split among `blocks`; products stay under 2^32 for every real shape.
__device__ __forceinline__ u32 unit_begin(u32 block, u32 units, u32 blocks) { return u64(block) * units / blocks; }

// The block that works on a unit: the inverse of unit_begin.
__device__ __forceinline__ u32 block_of(u32 unit, u32 units, u32 blocks) {
    return u32(((u64(unit) + 1) * blocks - 1) / units);
}

// ---- Instructions ------------------------------------------------------------------------------------------------
// A host build, by which the tests run these kernels without a GPU, has its own (tests/cuda_host).

#ifdef CUDA_HOST
#include "int4_matmul_instructions.h"
#else
__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory past L1; zeros when `valid` is false (the address is then not read).
__device__ __forceinline__ void copy_16(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_16(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ u32 load_4(u32 from) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void store_16(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Four 8×8 matrices of 16-bit values, one row address a lane.
__device__ __forceinline__ void load_matrices(u32 from, u32 &a, u32 &b, u32 &c, u32 &d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(from)
                 : "memory");
}

// d += a·b for 16 features, 8 tokens and one tile.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// (x & mask) | magic, in one instruction.
template <u32 MASK, u32 MAGIC> __device__ __forceinline__ u32 and_or(u32 x) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(x), "n"(MASK), "n"(MAGIC));
    return r;
}
__device__ __forceinline__ u32 subtract_f16x2(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 multiply_f16x2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
__device__ __forceinline__ float f16_to_f32(u32 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(u16(bits)));
    return r;
}
__device__ __forceinline__ u16 to_bf16(float x) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ u16 to_element(float x) {
#if BF16
    return to_bf16(x);
#else
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
#endif
}

// Loads and stores that other blocks of the same grid see: past L1.
__device__ __forceinline__ float load_across(const float *from) {
    float r;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(from) : "memory");
    return r;
}
__device__ __forceinline__ uint4 load_across(const uint4 *from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_across(float *to, float v) {
    asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory");
}
__device__ __forceinline__ u32 load_acquire(const u32 *from) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// Under programmatic stream serialization the next kernel may start now; nothing but weights and parameters, which no
// kernel of the stream writes, is touched before await_inputs.
__device__ __forceinline__ void admit_next() {
#if PDL && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_inputs() {
#if PDL && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if WGMMA
// Barriers in shared memory, 8 bytes each. A phase ends when `count` threads have arrived and all bytes that were
// expected have come; a wait ends when the phase with its parity has ended.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes barriers and their first phase known to the engine that copies.
__device__ __forceinline__ void barrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 ended;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!ended);
}

// A tensor's address, sizes and box, as cuTensorMapEncodeTiled makes it.
struct __align__(128) TensorMap {
    u64 opaque[16];
};

// The box of a map's tensor that begins at `column` and `row`, zeros beyond the tensor, to shared memory.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap *map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Moves registers between warpgroups: the most that a thread of this one may have from now on.
template <u32 COUNT> __device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <u32 COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// Among the first THREADS threads of a block.
__device__ __forceinline__ void consumers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// wgmma reads registers and shared memory, and writes registers, until it is waited for.
// `a` is complete before the fence: a register that is written between two products that are under way would make the
// assembler run them one by one.
template <u32 COUNT> __device__ __forceinline__ void wgmma_fence(u32 (&a)[COUNT][4]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Waits for all products since the last wait.
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d += a·b for 64 features, 256 tokens and one tile; b by its descriptor.
#define TEN(DIGIT)                                                                                                     \
    "%" #DIGIT "0,%" #DIGIT "1,%" #DIGIT "2,%" #DIGIT "3,%" #DIGIT "4,%" #DIGIT "5,%" #DIGIT "6,%" #DIGIT "7,%" #DIGIT \
    "8,%" #DIGIT "9,"
#define SUMS_4(I) "+f"(d[I][0]), "+f"(d[I][1]), "+f"(d[I][2]), "+f"(d[I][3])
#define SUMS_16(I) SUMS_4(I), SUMS_4(I + 1), SUMS_4(I + 2), SUMS_4(I + 3)
#define SUMS_128                                                                                                       \
    SUMS_16(0), SUMS_16(4), SUMS_16(8), SUMS_16(12), SUMS_16(16), SUMS_16(20), SUMS_16(24), SUMS_16(28)
#if BF16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif
__device__ __forceinline__ void wgmma(float (&d)[32][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16" WGMMA_TYPES
                 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
                 "%120,%121,%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131}, %132, 1, 1, 1, 0;"
                 : SUMS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Keeps the compiler from reading sums before the wait that precedes this.
__device__ __forceinline__ void wgmma_sums(float (&d)[32][4]) { asm volatile("" : SUMS_128::"memory"); }
#endif

#endif // CUDA_HOST

// ---- Codes to numbers --------------------------------------------------------------------------------------------

// What is subtracted from a code in rows r and r + 8 of a strip, in the form that dequantize wants.
struct Zero {
    u32 low, high;
};

// `word`: zero points of rows r (low half) and r + 8 (high half).
__device__ __forceinline__ Zero zero_of(u32 word) {
#if BITS == 8 && BF16
    return {(word & 0xffff) + 0x4B000000, (word >> 16) + 0x4B000000}; // 2^23 + z in fp32
#else
    u32 low = __byte_perm(word, 0, 0x1010), high = __byte_perm(word, 0, 0x3232);
#if BITS == 8
    return {low + 0x64006400, high + 0x64006400}; // 1024 + z in fp16
#elif BF16
    return {low + 0xC300C300, high + 0xC300C300}; // -(128 + z) in bf16
#else
    return {low + 0x64006400, (high << 4) + 0xD400D400}; // 1024 + z and -(64 + z) in fp16
#endif
#endif
}

__device__ __forceinline__ Zero symmetric_zero() { return zero_of((1u << (BITS - 1)) * 0x00010001u); }

// q - z for the A operand of one tile, exact: rows r in a[0] and a[2], rows r + 8 in a[1] and a[3].
//
// A code is put into the mantissa of a power of two whose last place is 1 (or 1/16 of the code's place), which turns
// it into a number without a conversion instruction; one subtraction or fused multiply-add then removes power and zero
// point. At 4 bits register i holds nibbles i and i + 4, so that one mask yields both halves.
__device__ __forceinline__ void dequantize(u32 (&a)[4], const u32 (&w)[WORDS], const Zero &zero) {
#if BITS == 4 && !BF16
    constexpr u32 MAGIC = 0x64006400, SIXTEENTH = 0x2C002C00; // 1024 in fp16, 1/16
    u32 next = w[0] >> 8;
    a[0] = subtract_f16x2(and_or<0x000F000F, MAGIC>(w[0]), zero.low);
    a[1] = fma_f16x2(and_or<0x00F000F0, MAGIC>(w[0]), SIXTEENTH, zero.high);
    a[2] = subtract_f16x2(and_or<0x000F000F, MAGIC>(next), zero.low);
    a[3] = fma_f16x2(and_or<0x00F000F0, MAGIC>(next), SIXTEENTH, zero.high);
#elif BITS == 4
    constexpr u32 MAGIC = 0x43004300, ONE = 0x3F803F80; // 128 in bf16: its last place is 1, a nibble fills the mantissa
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        a[i] = fma_bf16x2(and_or<0x000F000F, MAGIC>(w[0] >> 4 * i), ONE, i % 2 ? zero.high : zero.low);
#elif !BF16
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 numbers = __byte_perm(w[i / 2], 0x64646464, i % 2 ? 0x4342 : 0x4140);
        a[i] = subtract_f16x2(numbers, i % 2 ? zero.high : zero.low);
    }
#else
    // A byte does not fit the mantissa of bf16; the difference does (|q - z| <= 256), so fp32's upper half is exact.
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        float z = __uint_as_float(i % 2 ? zero.high : zero.low);
        float first = __uint_as_float(__byte_perm(w[i / 2], 0x4B000000, i % 2 ? 0x7542 : 0x7540)) - z;
        float second = __uint_as_float(__byte_perm(w[i / 2], 0x4B000000, i % 2 ? 0x7543 : 0x7541)) - z;
        a[i] = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
    }
#endif
}

// Words of the tiles of a strip that one 16-byte load brings.
constexpr u32 LOADED_TILES = 4 / WORDS;

__device__ __forceinline__ void words_of(u32 (&w)[WORDS], const uint4 &loaded, u32 tile) {
    const u32 all[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (u32 i = 0; i < WORDS; i++)
        w[i] = all[tile % LOADED_TILES * WORDS + i];
}

// ---- Few tokens --------------------------------------------------------------------------------------------------

// A *unit* is FEW_STRIPS strips by one chunk. Units, numbered chunk by chunk within a block of strips, are split evenly
// among the thread blocks (stream-K), and a thread block's units go round among its warps. Each warp has its own
// pipeline in shared memory, weights, parameters and activations of FEW_STAGES units, so the loop has no barrier among
// warps. Weights are read from device memory once.
constexpr u32 FEW_FEATURES = FEW_STRIPS * STRIP;
constexpr u32 FEW_WEIGHT_BYTES = FEW_STRIPS * CHUNK_BYTES;
constexpr u32 FEW_PARAM_BYTES = FEW_STRIPS * PARTS * PARAM_BYTES;

__device__ constexpr u32 few_stage_bytes(u32 blocks) {
    return (FEW_WEIGHT_BYTES + blocks * 8 * 128 + FEW_PARAM_BYTES + 127) / 128 * 128;
}

struct FewArguments {
    const u8 *weights;
    const u8 *params;
    const u16 *x;       // [M, K]
    const u32 *perm;    // [K], or null
    u16 *gathered;      // [M, K] workspace, when perm is given
    u16 *y;             // [M, N]
    float *partials;    // [blocks, 2, FEW_FEATURES * tokens] workspace
    u32 *counters;      // [2 + ceil(N / FEW_FEATURES)] workspace, zero before the first launch and after every one
    u32 m, n, k, group; // group: padded K when there is one per channel
};

// Every block of the grid must be resident for the barrier: the launch is cooperative, or the grid no larger than fits.
__device__ __forceinline__ void gather_activations(const FewArguments &a) {
    u32 pieces = a.m * (a.k / 8);
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < pieces; i += gridDim.x * THREADS) {
        u32 token = i / (a.k / 8), j = i % (a.k / 8) * 8;
        const u16 *row = a.x + u64(token) * a.k;
        u32 packed[4];
#pragma unroll
        for (u32 e = 0; e < 4; e++)
            packed[e] = row[a.perm[j + 2 * e]] | u32(row[a.perm[j + 2 * e + 1]]) << 16;
        *reinterpret_cast<uint4 *>(a.gathered + u64(token) * a.k + j) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&a.counters[0], 1);
        while (load_acquire(&a.counters[0]) < gridDim.x) {
        }
        // The last block to see the count full resets it for the next launch.
        if (atomicAdd(&a.counters[1], 1) == gridDim.x - 1) {
            a.counters[1] = 0;
            a.counters[0] = 0;
            __threadfence();
        }
    }
    __syncthreads();
}

template <u32 BLOCKS> // of 8 tokens
__device__ __forceinline__ void few(const FewArguments &a) {
    constexpr u32 STAGE = few_stage_bytes(BLOCKS), VALUES = FEW_STRIPS * BLOCKS * 4;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 arrivals;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 pipeline = shared_address(shared) + warp * FEW_STAGES * STAGE;
    float *sums = reinterpret_cast<float *>(shared + WARPS * FEW_STAGES * STAGE); // [WARPS, VALUES, 32]

    const u32 chunks = (a.k + CHUNK - 1) / CHUNK, groups = (chunks * CHUNK + a.group - 1) / a.group;
    const u32 units = (a.n + FEW_FEATURES - 1) / FEW_FEATURES * chunks;
    // No block among those that work is empty, which the count of arrivals relies on; the rest only gather.
    const u32 workers = min(gridDim.x, units);
    const u32 begin = unit_begin(min(blockIdx.x, workers), units, workers);
    const u32 end = unit_begin(min(blockIdx.x + 1, workers), units, workers);

    auto copy_weights = [&](u32 unit, u32 stage) {
        u32 strip = unit / chunks * FEW_STRIPS, chunk = unit % chunks, to = pipeline + stage * STAGE;
#pragma unroll
        for (u32 i = 0; i < FEW_WEIGHT_BYTES / 512; i++) {
            u32 s = i / (CHUNK_BYTES / 512), part = i % (CHUNK_BYTES / 512);
            copy_16(to + i * 512 + lane * 16,
                    a.weights + weight_offset(strip + s, chunk, chunks) + part * 512 + lane * 16, true);
        }
        constexpr u32 PIECES = FEW_PARAM_BYTES / 16, EACH = PARAM_BYTES / 16;
        to += FEW_WEIGHT_BYTES + BLOCKS * 8 * 128;
#pragma unroll
        for (u32 i = 0; i < (PIECES + 31) / 32; i++) {
            u32 piece = i * 32 + lane;
            if (PIECES % 32 == 0 || piece < PIECES) {
                u32 s = piece / (EACH * PARTS), part = piece / EACH % PARTS;
                u32 group = (chunk * CHUNK + part * GROUP_TILES * TILE) / a.group;
                copy_16(to + piece * 16, a.params + param_offset(strip + s, group, groups) + piece % EACH * 16, true);
            }
        }
    };

    admit_next();
    // The weights of the first units do not depend on anything: they are under way before all else.
#pragma unroll
    for (u32 i = 0; i < FEW_STAGES; i++) {
        u32 unit = begin + warp + i * WARPS;
        if (unit < end)
            copy_weights(unit, i);
        copy_commit();
    }
    await_inputs();
    if (a.perm)
        gather_activations(a);
    const u16 *x = a.perm ? a.gathered : a.x;

    // Activations of the first units: plain loads, since their copies would complete only after all weights above.
    // Tokens from M on are zeros here and never written again.
#pragma unroll
    for (u32 i = 0; i < FEW_STAGES; i++) {
        u32 unit = begin + warp + i * WARPS;
#pragma unroll
        for (u32 j = 0; j < BLOCKS * 2; j++) {
            u32 token = (j * 32 + lane) / 8, piece = lane % 8, feature = unit % chunks * CHUNK + piece * 8;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (unit < end && token < a.m && feature < a.k)
                v = load_across(reinterpret_cast<const uint4 *>(x + u64(token) * a.k + feature));
            store_16(pipeline + i * STAGE + FEW_WEIGHT_BYTES + token_offset(token, piece), v);
        }
    }

    float acc[FEW_STRIPS][BLOCKS][4] = {};
    u32 stage = 0, unit = begin + warp;
    for (u32 segment = begin; segment < end;) {
        const u32 block = segment / chunks, stop = min(end, (block + 1) * chunks);
        for (; unit < stop; unit += WARPS) {
            copy_wait<FEW_STAGES - 1>();
            __syncwarp();
            const u32 from = pipeline + stage * STAGE, tokens = from + FEW_WEIGHT_BYTES;
            const u32 params = tokens + BLOCKS * 8 * 128 + lane / 4 * 4;
            u32 b[TILES][BLOCKS][2];
#pragma unroll
            for (u32 t = 0; t < TILES; t += 2)
#pragma unroll
                for (u32 i = 0; i < BLOCKS; i++)
                    load_matrices(tokens + token_offset(two_tiles_token(lane) + i * 8, two_tiles_piece(t, lane)),
                                  b[t][i][0], b[t][i][1], b[t + 1][i][0], b[t + 1][i][1]);
#pragma unroll
            for (u32 s = 0; s < FEW_STRIPS; s++) {
                uint4 loaded;
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) {
                    const u32 param = params + (s * PARTS + part) * PARAM_BYTES;
                    Zero zero = ZEROS ? zero_of(load_4(param + 32)) : symmetric_zero();
                    // Scales apply to the sum over a part in fp32: exact products, and fewer of them.
                    float sum[BLOCKS][4] = {};
#pragma unroll
                    for (u32 t = part * GROUP_TILES; t < (part + 1) * GROUP_TILES; t++) {
                        if (t % LOADED_TILES == 0)
                            loaded = load_16(from + s * CHUNK_BYTES + word_offset(t, lane));
                        u32 w[WORDS], values[4];
                        words_of(w, loaded, t);
                        dequantize(values, w, zero);
#pragma unroll
                        for (u32 i = 0; i < BLOCKS; i++)
                            mma(sum[i], values, b[t][i]);
                    }
                    const u32 scales = load_4(param);
                    const float low = f16_to_f32(scales & 0xffff), high = f16_to_f32(scales >> 16);
#pragma unroll
                    for (u32 i = 0; i < BLOCKS; i++)
#pragma unroll
                        for (u32 c = 0; c < 4; c++)
                            acc[s][i][c] = fmaf(c < 2 ? low : high, sum[i][c], acc[s][i][c]);
                }
            }
            __syncwarp(); // every lane is done with this stage before it is filled again
            const u32 next = unit + FEW_STAGES * WARPS;
            if (next < end) {
                copy_weights(next, stage);
#pragma unroll
                for (u32 j = 0; j < BLOCKS * 2; j++) {
                    u32 token = (j * 32 + lane) / 8, piece = lane % 8, feature = next % chunks * CHUNK + piece * 8;
                    if (token < a.m)
                        copy_16(tokens + token_offset(token, piece),
                                x + (feature < a.k ? u64(token) * a.k + feature : 0), feature < a.k);
                }
            }
            copy_commit();
            stage = stage + 1 == FEW_STAGES ? 0 : stage + 1;
        }

        // The warps' sums are added in the order of warps.
#pragma unroll
        for (u32 v = 0; v < VALUES; v++) {
            float &value = acc[v / (BLOCKS * 4)][v / 4 % BLOCKS][v % 4];
            sums[(warp * VALUES + v) * 32 + lane] = value;
            value = 0;
        }
        __syncthreads();
        const u32 first = block_of(block * chunks, units, workers);
        const u32 last = block_of((block + 1) * chunks - 1, units, workers);
        auto finish = [&](u32 i, float sum) {
            u32 v = i / 32, feature = v / (BLOCKS * 4) * STRIP + accumulator_feature(i % 32, v % 4);
            u32 token = v / 4 % BLOCKS * 8 + accumulator_token(i % 32, v % 4);
            feature += block * FEW_FEATURES;
            if (feature < a.n)
                a.y[u64(token) * a.n + feature] = to_element(sum);
        };
        auto in_use = [&](u32 i) { return i / 128 % BLOCKS * 8 + accumulator_token(i % 32, i / 32 % 4) < a.m; };
        // A block that starts within this block of strips has it as its first segment, else it is its last.
        auto partial = [&](u32 of) {
            u32 second = unit_begin(of, units, workers) / chunks != block;
            return a.partials + (of * 2 + second) * (VALUES * 32);
        };
        for (u32 i = threadIdx.x; i < VALUES * 32; i += THREADS) {
            if (!in_use(i))
                continue;
            float sum = 0;
#pragma unroll
            for (u32 from = 0; from < WARPS; from++)
                sum += sums[from * (VALUES * 32) + i];
            if (first == last)
                finish(i, sum);
            else
                store_across(partial(blockIdx.x) + i, sum);
        }
        if (first != last) {
            // Whoever comes last adds all partial sums, in the order of blocks whatever the order of arrival.
            // The fences stand beside the atomic, in its thread: what other threads have written and will read is
            // ordered with them by the barriers.
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                arrivals = atomicAdd(&a.counters[2 + block], 1);
                __threadfence();
            }
            __syncthreads();
            if (arrivals == last - first) {
                for (u32 i = threadIdx.x; i < VALUES * 32; i += THREADS) {
                    if (!in_use(i))
                        continue;
                    float sum = 0;
                    for (u32 of = first; of <= last; of++)
                        sum += load_across(partial(of) + i);
                    finish(i, sum);
                }
                if (threadIdx.x == 0)
                    a.counters[2 + block] = 0;
            }
        }
        __syncthreads(); // `sums` and `arrivals` may be written again
        segment = stop;
    }
}

#if !WGMMA
// M <= 8 and M <= 16. Grid: any number of blocks, THREADS threads each; with perm, no more than are resident at once.
#define FEW(NAME, BLOCKS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        NAME(const u8 *weights, const u8 *params, const u16 *x, const u32 *perm, u16 *gathered, u16 *y,               \
             float *partials, u32 *counters, u32 m, u32 n, u32 k, u32 group) {                                         \
        few<BLOCKS>({weights, params, x, perm, gathered, y, partials, counters, m, n, k, group});                      \
    }
FEW(int4_matmul_few_8, 1)
FEW(int4_matmul_few_16, 2)

// ---- Many tokens -------------------------------------------------------------------------------------------------

// x[M, K] with its features in the order of perm. A gather inside `many` would read a 32-byte sector for each 2-byte
// value, once per block of output features; done once here it costs a few per cent of the product.
extern "C" __global__ void __launch_bounds__(THREADS)
    int4_gather(const u16 *x, const u32 *perm, u16 *gathered, u32 m, u32 k) {
    admit_next();
    await_inputs();
    u32 j = (blockIdx.x * THREADS + threadIdx.x) * 8;
    if (j >= k)
        return;
    uint4 from[2] = {*reinterpret_cast<const uint4 *>(perm + j), *reinterpret_cast<const uint4 *>(perm + j + 4)};
    for (u32 token = blockIdx.y; token < m; token += gridDim.y) {
        const u16 *row = x + u64(token) * k;
        *reinterpret_cast<uint4 *>(gathered + u64(token) * k + j) =
            make_uint4(row[from[0].x] | u32(row[from[0].y]) << 16, row[from[0].z] | u32(row[from[0].w]) << 16,
                       row[from[1].x] | u32(row[from[1].y]) << 16, row[from[1].z] | u32(row[from[1].w]) << 16);
    }
}
#endif

constexpr u32 MANY_STRIPS = 8; // of a block: 128 output features
constexpr u32 MANY_FEATURES = MANY_STRIPS * STRIP;
constexpr u32 WARP_STRIPS = 4; // of a warp: two warps side by side along features, four along tokens
constexpr u32 MANY_PARAM_BYTES = MANY_STRIPS * PARTS * PARAM_BYTES;
constexpr u32 OUTPUT_PITCH = MANY_FEATURES * 2 + 16; // bytes of a token in the epilogue's tile; the pad spreads banks

__device__ constexpr u32 many_stage_bytes(u32 tokens) { return tokens * 128 + MANY_STRIPS * CHUNK_BYTES + MANY_PARAM_BYTES; }

// Scales of rows r and r + 8. fp16: each in both halves of its word. bf16 has fewer bits than an fp16 scale, so there
// the scale is a sum of two, and both rows share a word of each until they are used: registers are short.
struct Scale {
    u32 first, second;
};

__device__ __forceinline__ Scale scale_of(u32 word) {
#if BF16
    float low = f16_to_f32(word & 0xffff), high = f16_to_f32(word >> 16);
    u32 values = to_bf16(low) | u32(to_bf16(high)) << 16;
    u32 rest_low = to_bf16(low - __uint_as_float(values << 16));
    u32 rest_high = to_bf16(high - __uint_as_float(values & 0xffff0000));
    return {values, rest_low | rest_high << 16};
#else
    return {__byte_perm(word, 0, 0x1010), __byte_perm(word, 0, 0x3232)};
#endif
}

// s·(q - z), rounded once (bf16: but for the last place of the rest).
__device__ __forceinline__ void apply_scale(u32 (&a)[4], const Scale &s) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#if BF16
        const u32 row = i % 2 ? 0x3232 : 0x1010, negative_zero = 0x80008000;
        u32 rest = fma_bf16x2(a[i], __byte_perm(s.second, 0, row), negative_zero);
        a[i] = fma_bf16x2(a[i], __byte_perm(s.first, 0, row), rest);
#else
        a[i] = multiply_f16x2(a[i], i % 2 ? s.second : s.first);
#endif
    }
}

// What a lane holds of a strip between two tiles.
struct Strip {
    uint4 loaded;
    Scale scale;
    Zero zero;
};

// The A operand of a tile of a strip: s·(q - z). `words` and `param` are the chunk's, in shared memory.
__device__ __forceinline__ void make_operand(u32 (&values)[4], Strip &strip, u32 words, u32 param, u32 t, u32 lane) {
    if (t % LOADED_TILES == 0)
        strip.loaded = load_16(words + word_offset(t, lane));
    if (t % GROUP_TILES == 0) {
        u32 at = param + t / GROUP_TILES * PARAM_BYTES + lane / 4 * 4;
        strip.scale = scale_of(load_4(at));
        strip.zero = ZEROS ? zero_of(load_4(at + 32)) : symmetric_zero();
    }
    u32 w[WORDS];
    words_of(w, strip.loaded, t);
    dequantize(values, w, strip.zero);
    apply_scale(values, strip.scale);
}

// A warp's sums of `STRIPS` strips and `BLOCKS` blocks of 8 tokens, to the output tile in shared memory.
template <u32 STRIPS, u32 BLOCKS>
__device__ __forceinline__ void put_outputs(u8 *shared, const float (&acc)[STRIPS][BLOCKS][4], u32 strip, u32 token,
                                            u32 lane) {
#pragma unroll
    for (u32 s = 0; s < STRIPS; s++)
#pragma unroll
        for (u32 i = 0; i < BLOCKS; i++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                u32 row = token + i * 8 + accumulator_token(lane, c);
                u32 feature = (strip + s) * STRIP + accumulator_feature(lane, c);
                *reinterpret_cast<u16 *>(shared + row * OUTPUT_PITCH + feature * 2) = to_element(acc[s][i][c]);
            }
}

// The output tile to y, 16 bytes at a time along N.
template <u32 TOKENS>
__device__ __forceinline__ void write_outputs(u32 base, u16 *y, u32 first_token, u32 first_feature, u32 m, u32 n) {
    for (u32 i = threadIdx.x; i < TOKENS * (MANY_FEATURES / 8); i += THREADS) {
        u32 token = i / (MANY_FEATURES / 8), feature = i % (MANY_FEATURES / 8) * 8;
        if (first_token + token < m && first_feature + feature < n)
            *reinterpret_cast<uint4 *>(y + u64(first_token + token) * n + first_feature + feature) =
                load_16(base + token * OUTPUT_PITCH + feature * 2);
    }
}

// One block makes `TOKENS` tokens by 128 output features, eight warps 2 by 4. Scales go into the weights here: fp32
// sums per group would double the accumulators. A strip's values for the next tile are made while the tensor cores work
// on the strips after it: the four strips are the register buffers, and a second set would not fit beside 128 sums.
template <u32 TOKENS>
__device__ __forceinline__ void many(const u8 *weights, const u8 *params, const u16 *x, u16 *y, u32 m, u32 n, u32 k,
                                     u32 group) {
    constexpr u32 STAGE = many_stage_bytes(TOKENS), WARP_TOKENS = TOKENS / 4, BLOCKS = WARP_TOKENS / 8;
    static_assert(MANY_STAGES * STAGE >= TOKENS * OUTPUT_PITCH, "the epilogue reuses the pipeline");
    extern __shared__ __align__(128) u8 shared[];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = shared_address(shared);
    const u32 strip_in_block = warp % 2 * WARP_STRIPS, token_in_block = warp / 2 * WARP_TOKENS;
    const u32 first_token = blockIdx.x * TOKENS, first_strip = blockIdx.y * MANY_STRIPS;
    const u32 chunks = (k + CHUNK - 1) / CHUNK, groups = (chunks * CHUNK + group - 1) / group;

    auto copy_weights = [&](u32 chunk) {
        u32 to = base + chunk % MANY_STAGES * STAGE + TOKENS * 128;
#pragma unroll
        for (u32 i = 0; i < MANY_STRIPS * CHUNK_BYTES / 16 / THREADS; i++) {
            u32 at = (i * THREADS + threadIdx.x) * 16;
            copy_16(to + at, weights + weight_offset(first_strip + at / CHUNK_BYTES, chunk, chunks) + at % CHUNK_BYTES,
                    true);
        }
        constexpr u32 PIECES = MANY_PARAM_BYTES / 16, EACH = PARAM_BYTES / 16;
        u32 piece = threadIdx.x;
        if (piece < PIECES) {
            u32 s = piece / (EACH * PARTS), part = piece / EACH % PARTS;
            u32 g = (chunk * CHUNK + part * GROUP_TILES * TILE) / group;
            copy_16(to + MANY_STRIPS * CHUNK_BYTES + piece * 16,
                    params + param_offset(first_strip + s, g, groups) + piece % EACH * 16, true);
        }
    };
    auto copy_tokens = [&](u32 chunk) {
        u32 to = base + chunk % MANY_STAGES * STAGE;
#pragma unroll
        for (u32 i = 0; i < TOKENS * 8 / THREADS; i++) {
            u32 token = (i * THREADS + threadIdx.x) / 8, piece = threadIdx.x % 8, feature = chunk * CHUNK + piece * 8;
            bool valid = first_token + token < m && feature < k;
            copy_16(to + token_offset(token, piece), x + (valid ? u64(first_token + token) * k + feature : 0), valid);
        }
    };

    admit_next();
    await_inputs();
#pragma unroll
    for (u32 chunk = 0; chunk < MANY_STAGES - 1; chunk++) {
        if (chunk < chunks) {
            copy_weights(chunk);
            copy_tokens(chunk);
        }
        copy_commit();
    }

    float acc[WARP_STRIPS][BLOCKS][4] = {};
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        copy_wait<MANY_STAGES - 2>();
        __syncthreads(); // this chunk has arrived for all, and all are done with the one before it
        const u32 next = chunk + MANY_STAGES - 1;
        if (next < chunks) {
            copy_weights(next);
            copy_tokens(next);
        }
        copy_commit();

        const u32 from = base + chunk % MANY_STAGES * STAGE, words = from + TOKENS * 128 + strip_in_block * CHUNK_BYTES;
        const u32 param = from + TOKENS * 128 + MANY_STRIPS * CHUNK_BYTES + strip_in_block * PARTS * PARAM_BYTES;
        Strip strips[WARP_STRIPS];
        u32 values[WARP_STRIPS][4];
        auto make = [&](u32 s, u32 t) {
            make_operand(values[s], strips[s], words + s * CHUNK_BYTES, param + s * PARTS * PARAM_BYTES, t, lane);
        };
#pragma unroll
        for (u32 s = 0; s < WARP_STRIPS; s++)
            make(s, 0);
#pragma unroll
        for (u32 t = 0; t < TILES; t++) {
            // Keeps the assembler from moving loads of all tiles to the front, for which it would spill.
            if (TOKENS == 256)
                __syncwarp();
            u32 b[BLOCKS][2];
#pragma unroll
            for (u32 i = 0; i < BLOCKS; i += 2) {
                u32 token = token_in_block + i * 8 + two_blocks_token(lane);
                load_matrices(from + token_offset(token, two_blocks_piece(t, lane)), b[i][0], b[i][1], b[i + 1][0],
                              b[i + 1][1]);
            }
#pragma unroll
            for (u32 s = 0; s < WARP_STRIPS; s++) {
#pragma unroll
                for (u32 i = 0; i < BLOCKS; i++)
                    mma(acc[s][i], values[s], b[i]);
                if (t + 1 < TILES)
                    make(s, t + 1);
            }
        }
    }

    copy_wait<0>();
    __syncthreads(); // all are done with the pipeline, whose memory the output tile takes
    put_outputs(shared, acc, strip_in_block, token_in_block, lane);
    __syncthreads();
    write_outputs<TOKENS>(base, y, first_token, first_strip * STRIP, m, n);
}

#if !WGMMA
// Grid: (ceil(M / tokens), ceil(N / 128)), THREADS threads. x: already in the order of perm.
#define MANY(NAME, TOKENS, RESIDENT)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)                                                    \
        NAME(const u8 *weights, const u8 *params, const u16 *x, u16 *y, u32 m, u32 n, u32 k, u32 group) {             \
        many<TOKENS>(weights, params, x, y, m, n, k, group);                                                           \
    }
MANY(int4_matmul_many_64, 64, 2)
MANY(int4_matmul_many_128, 128, 1)
MANY(int4_matmul_many_256, 256, 1)
#endif

// ---- Many tokens on Hopper ---------------------------------------------------------------------------------------
// Not verified on a GPU: see docs/kernels.md.

#if WGMMA
// 256 tokens by 128 output features. Warps 0 to 7 are two warpgroups of 64 features each: a warp makes its strip's A
// operands of a chunk in registers while the tensor cores work on the other warpgroup's. Warp 8 copies; registers move by
// warpgroups, so that it is one of four of which three end at once.
constexpr u32 WGMMA_TOKENS = 256;
constexpr u32 WGMMA_THREADS = THREADS + 128;
constexpr u32 BOX_BYTES = WGMMA_TOKENS * 128; // of activations in a stage
constexpr u32 REST_BYTES = MANY_STRIPS * CHUNK_BYTES + MANY_PARAM_BYTES;

static_assert(MANY_STAGES * BOX_BYTES >= WGMMA_TOKENS * OUTPUT_PITCH, "the epilogue reuses the pipeline");

// The B operand of a tile: 256 tokens by 16 features in rows of 128 bytes, swizzled as token_offset is, 8 rows 1024
// bytes apart from the next 8. The hardware swizzles addresses, so that a step along the row is a plain sum.
__device__ __forceinline__ u64 operand_descriptor(u32 address) {
    return u64(1) << 62 | u64(1024 / 16) << 32 | u64(1) << 16 | (address & 0x3ffff) / 16;
}

// Grid: (ceil(M / 256), ceil(N / 128)), WGMMA_THREADS threads. `x` maps x[M, K], in the order of perm, in boxes of 64
// features by 256 tokens, swizzled by 128 bytes.
extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)
    int4_matmul_wgmma_256(const u8 *weights, const u8 *params, const __grid_constant__ TensorMap x, u16 *y, u32 m,
                          u32 n, u32 k, u32 group) {
    extern __shared__ __align__(1024) u8 boxes[];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = shared_address(boxes);
    const u32 rest = base + MANY_STAGES * BOX_BYTES, barriers = rest + MANY_STAGES * REST_BYTES;
    const u32 first_token = blockIdx.x * WGMMA_TOKENS, first_strip = blockIdx.y * MANY_STRIPS;
    const u32 chunks = (k + CHUNK - 1) / CHUNK, groups = (chunks * CHUNK + group - 1) / group;
    auto full = [&](u32 chunk) { return barriers + chunk % MANY_STAGES * 16; };
    auto empty = [&](u32 chunk) { return full(chunk) + 8; };
    auto phase = [&](u32 chunk) { return chunk / MANY_STAGES & 1; };

    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < MANY_STAGES; stage++) {
            barrier_init(full(stage), 1);
            barrier_init(empty(stage), WARPS);
        }
        barrier_publish();
    }
    __syncthreads();
    admit_next();
    await_inputs();

    if (warp >= WARPS) {
        keep_registers<40>();
        for (u32 chunk = 0; warp == WARPS && chunk < chunks; chunk++) {
            if (chunk >= MANY_STAGES)
                barrier_wait(empty(chunk), phase(chunk - MANY_STAGES));
            if (lane == 0) {
                barrier_arrive_expecting(full(chunk), BOX_BYTES + REST_BYTES);
                copy_box(base + chunk % MANY_STAGES * BOX_BYTES, &x, chunk * CHUNK, first_token, full(chunk));
            }
            const u32 to = rest + chunk % MANY_STAGES * REST_BYTES;
            for (u32 i = lane; i < MANY_STRIPS * (1 + PARTS); i += 32) {
                if (i < MANY_STRIPS) {
                    copy_bytes(to + i * CHUNK_BYTES, weights + weight_offset(first_strip + i, chunk, chunks),
                               CHUNK_BYTES, full(chunk));
                } else {
                    const u32 j = i - MANY_STRIPS, part = j % PARTS;
                    const u32 g = (chunk * CHUNK + part * GROUP_TILES * TILE) / group;
                    copy_bytes(to + MANY_STRIPS * CHUNK_BYTES + j * PARAM_BYTES,
                               params + param_offset(first_strip + j / PARTS, g, groups), PARAM_BYTES, full(chunk));
                }
            }
        }
        return;
    }

    take_registers<232>();
    float acc[1][WGMMA_TOKENS / 8][4] = {};
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        const u32 box = base + chunk % MANY_STAGES * BOX_BYTES, from = rest + chunk % MANY_STAGES * REST_BYTES;
        const u32 words = from + warp * CHUNK_BYTES;
        const u32 param = from + MANY_STRIPS * CHUNK_BYTES + warp * PARTS * PARAM_BYTES;
        Strip strip;
        u32 values[TILES][4];
        barrier_wait(full(chunk), phase(chunk));
#pragma unroll
        for (u32 t = 0; t < TILES; t++)
            make_operand(values[t], strip, words, param, t, lane);
        wgmma_fence(values);
#pragma unroll
        for (u32 t = 0; t < TILES; t++)
            wgmma(acc[0], values[t], operand_descriptor(box + t * TILE * 2));
        wgmma_wait();
        __syncwarp(); // all lanes have read their words
        if (lane == 0)
            barrier_arrive(empty(chunk));
    }
    wgmma_sums(acc[0]);
    consumers_barrier(); // the last copies have been used by all
    put_outputs(boxes, acc, warp, 0, lane);
    consumers_barrier();
    write_outputs<WGMMA_TOKENS>(base, y, first_token, first_strip * STRIP, m, n);
}
#endif
