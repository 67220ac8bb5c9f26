// What a text of kernels needs of CUDA, for the machine's own C++ compiler: words, vectors, arithmetic, barriers.
//
// A kernel's text is compiled as it is, with the compiler's hooks on every load and store (-fsanitize=thread, without its
// library) and on undefined behaviour; memory.cpp answers the former, undefined.cpp the latter. Threads are fibers
// (machine.cpp). See docs/kernels.md.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define CUDA_HOST 1

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(BYTES) __attribute__((aligned(BYTES)))
// Inside a function `thread_local` means `static thread_local`, after `extern` it does not. What is thread-local in the
// library is shared memory and nothing else: the machine finds it as one segment, and keeps one for each block.
#define __shared__ thread_local

struct uint3 {
    unsigned x, y, z;
};
struct alignas(4) uchar4 {
    unsigned char x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the machine, as an instruction sees it ----

namespace cuda_host {

uint3 thread_index();
uint3 block_index();
uint3 grid_size();

// Addresses of the shared window, 32 bits wide.
unsigned shared_address(const void* pointer);
void* shared_pointer(unsigned address);

// cp.async: the first `valid` of `bytes`, zeros behind them. Until the issuing thread has waited for it, the
// destination is touched by nobody and the source changed by nobody.
void copy_async(void* to, const void* from, unsigned bytes, unsigned valid, int line);
void commit_copies();
void wait_for_copies(unsigned pending);

// An instruction that the lanes of a warp execute together: `run` sees what all of them brought.
void together(const char* instruction, int line, void (*run)(void* const* lanes), void* own);

void block_barrier(int line);
void warp_barrier(int line);
void fence();
unsigned add_atomically(unsigned* to, unsigned value);
// ld.acquire; may be called again and again until another thread has written.
unsigned load_acquire(const unsigned* from);

// A barrier in shared memory that counts arrivals, and bytes of copies: `count` arrivals end a phase once all bytes that were
// expected have come. A wait is for the end of the phase with this parity.
void barrier_init(unsigned address, unsigned count, int line);
void barrier_publish();
void barrier_arrive(unsigned address, unsigned expected, int line);
void barrier_wait(unsigned address, unsigned parity, int line);
// Copies that a barrier counts: bytes, or the box of a tensor map that begins at a column and a row.
void copy_bytes(unsigned to, const void* from, unsigned bytes, unsigned barrier, int line);
void copy_box(unsigned to, const void* map, unsigned column, unsigned row, unsigned barrier, int line);
// A barrier of the first threads of a block.
void part_barrier(unsigned threads, int line);
// wgmma.m64n256k16 with a warp's 16 rows of A in registers, and B by its descriptor; d is [128]. The wait is for all.
void wgmma_fence();
void wgmma(float* d, const unsigned* a, uint64_t descriptor, float (*widen)(unsigned short), int line);
void wgmma_wait(int line);

// Numbers of 16 bits, rounded once, to the nearest, ties to even.
unsigned short to_f16(double value);
unsigned short to_bf16(double value);
float from_f16(unsigned short bits);
float from_bf16(unsigned short bits);
// a·b + c.
unsigned short fma_f16(unsigned short a, unsigned short b, unsigned short c);
unsigned short fma_bf16(unsigned short a, unsigned short b, unsigned short c);

// What a lane brings to mma.m16n8k16.row.col with fp32 sums, and takes away.
struct Mma {
    float* d;          // [4], c before and d after
    const unsigned* a; // [4]
    const unsigned* b; // [2]
};
void mma_f16(void* const* lanes);
void mma_bf16(void* const* lanes);

// What a lane brings to ldmatrix.x4, a row, and takes away.
struct LoadMatrices {
    unsigned row[4];
    unsigned words[4];
};
void load_matrices(void* const* lanes);

} // namespace cuda_host

#define threadIdx (cuda_host::thread_index())
#define blockIdx (cuda_host::block_index())
#define gridDim (cuda_host::grid_size())

// ---- CUDA's functions that the texts use ----

inline void __syncthreads(int line = __builtin_LINE()) { cuda_host::block_barrier(line); }
inline void __syncwarp(int line = __builtin_LINE()) { cuda_host::warp_barrier(line); }
inline void __threadfence() { cuda_host::fence(); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return cuda_host::add_atomically(to, value); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// Compiled with -ffp-contract=off: no two of these become one.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rn(double a) { return (float)a; }

template <typename To, typename From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int a) { return same_bits<float>(a); }
inline float __uint_as_float(unsigned a) { return same_bits<float>(a); }
inline int __float_as_int(float a) { return same_bits<int>(a); }
inline unsigned __float_as_uint(float a) { return same_bits<unsigned>(a); }

// Byte i of the result is the byte of (low, high) that nibble i of `which` names. The sign-copying form is not there.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned which) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(both >> ((which >> 4 * i & 7) * 8) & 255) << 8 * i;
    return result;
}

// ---- the list of kernels ----

namespace cuda_host {

// A kernel, called by the addresses of its arguments, as a launch gives them.
struct Kernel {
    const char* name;
    void (*call)(void* const* arguments);
    const unsigned* sizes; // of the arguments, bytes
    unsigned arguments;
};

template <auto KERNEL, typename = decltype(KERNEL)>
struct Entry;

template <auto KERNEL, typename... Arguments>
struct Entry<KERNEL, void (*)(Arguments...)> {
    static constexpr unsigned sizes[] = {(unsigned)sizeof(Arguments)...};

    template <size_t... I>
    __attribute__((no_sanitize("thread"), no_sanitize("undefined"))) static void
    take(void* const* from, std::index_sequence<I...>) {
        KERNEL(*static_cast<Arguments*>(from[I])...);
    }
    static void call(void* const* from) { take(from, std::index_sequence_for<Arguments...>()); }
    static constexpr Kernel named(const char* name) { return {name, call, sizes, (unsigned)sizeof...(Arguments)}; }
};

// What a library has beside the machine: its kernels, and its dynamic shared memory.
struct Library {
    const Kernel* kernels;
    unsigned count;
    unsigned char* (*dynamic)();
};
extern const Library library;

// The most that a block can ask for on any device that the kernels are for.
constexpr unsigned DYNAMIC_BYTES = 227 << 10;

} // namespace cuda_host

#define CUDA_HOST_KERNEL(NAME) cuda_host::Entry<NAME>::named(#NAME)
#define CUDA_HOST_LIBRARY(DYNAMIC, ...)                                                                                \
    static const cuda_host::Kernel kernels[] = {__VA_ARGS__};                                                          \
    extern const cuda_host::Library cuda_host::library = {                                                             \
        kernels, sizeof(kernels) / sizeof(kernels[0]), [] { return reinterpret_cast<unsigned char*>(DYNAMIC); }}
