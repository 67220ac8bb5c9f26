// The instructions of int4_matmul.cu, included by it.
#pragma once

inline u32 shared_address(const void* p) { return cuda_host::shared_address(p); }

inline void copy_16(u32 to, const void* from, bool valid, int line = __builtin_LINE()) {
    cuda_host::copy_async(cuda_host::shared_pointer(to), from, 16, valid ? 16 : 0, line);
}
inline void copy_commit() { cuda_host::commit_copies(); }
template <int PENDING>
inline void copy_wait() {
    cuda_host::wait_for_copies(PENDING);
}

inline uint4 load_16(u32 from) { return *static_cast<const uint4*>(cuda_host::shared_pointer(from)); }
inline u32 load_4(u32 from) { return *static_cast<const u32*>(cuda_host::shared_pointer(from)); }
inline void store_16(u32 to, uint4 v) { *static_cast<uint4*>(cuda_host::shared_pointer(to)) = v; }

inline void load_matrices(u32 from, u32& a, u32& b, u32& c, u32& d, int line = __builtin_LINE()) {
    const uint4 row = load_16(from);
    cuda_host::LoadMatrices own = {{row.x, row.y, row.z, row.w}, {}};
    cuda_host::together("ldmatrix", line, cuda_host::load_matrices, &own);
    a = own.words[0], b = own.words[1], c = own.words[2], d = own.words[3];
}

inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE()) {
    cuda_host::Mma own = {d, a, b};
    cuda_host::together("mma", line, BF16 ? cuda_host::mma_bf16 : cuda_host::mma_f16, &own);
}

template <u32 MASK, u32 MAGIC>
inline u32 and_or(u32 x) {
    return (x & MASK) | MAGIC;
}
template <u16 (*FMA)(u16, u16, u16)>
inline u32 each_half(u32 a, u32 b, u32 c) {
    return FMA((u16)a, (u16)b, (u16)c) | (u32)FMA(u16(a >> 16), u16(b >> 16), u16(c >> 16)) << 16;
}
inline u32 fma_f16x2(u32 a, u32 b, u32 c) { return each_half<cuda_host::fma_f16>(a, b, c); }
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) { return each_half<cuda_host::fma_bf16>(a, b, c); }
// Rounded once too: 1·a − b and a·b − 0, where −0 keeps a product's sign when it is zero.
inline u32 subtract_f16x2(u32 a, u32 b) { return fma_f16x2(0x3C003C00, a, b ^ 0x80008000); }
inline u32 multiply_f16x2(u32 a, u32 b) { return fma_f16x2(a, b, 0x80008000); }
inline float f16_to_f32(u32 bits) { return cuda_host::from_f16((u16)bits); }
inline u16 to_bf16(float x) { return cuda_host::to_bf16(x); }
inline u16 to_element(float x) { return BF16 ? cuda_host::to_bf16(x) : cuda_host::to_f16(x); }

inline float load_across(const float* from) { return *from; }
inline uint4 load_across(const uint4* from) { return *from; }
inline void store_across(float* to, float v) { *to = v; }
inline u32 load_acquire(const u32* from) { return cuda_host::load_acquire(from); }

// Launches follow one another here.
inline void admit_next() {}
inline void await_inputs() {}

#if WGMMA
inline void barrier_init(u32 barrier, u32 count, int line = __builtin_LINE()) {
    cuda_host::barrier_init(barrier, count, line);
}
inline void barrier_publish() { cuda_host::barrier_publish(); }
inline void barrier_arrive(u32 barrier, int line = __builtin_LINE()) { cuda_host::barrier_arrive(barrier, 0, line); }
inline void barrier_arrive_expecting(u32 barrier, u32 bytes, int line = __builtin_LINE()) {
    cuda_host::barrier_arrive(barrier, bytes, line);
}
inline void barrier_wait(u32 barrier, u32 parity, int line = __builtin_LINE()) {
    cuda_host::barrier_wait(barrier, parity, line);
}
struct TensorMap {
    u64 opaque[16];
};
inline void copy_box(u32 to, const TensorMap* map, u32 column, u32 row, u32 barrier, int line = __builtin_LINE()) {
    cuda_host::copy_box(to, map, column, row, barrier, line);
}
inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier, int line = __builtin_LINE()) {
    cuda_host::copy_bytes(to, from, bytes, barrier, line);
}
// Registers are not counted here.
template <u32 COUNT>
inline void keep_registers() {}
template <u32 COUNT>
inline void take_registers() {}
inline void consumers_barrier(int line = __builtin_LINE()) { cuda_host::part_barrier(256, line); }

template <u32 COUNT>
inline void wgmma_fence(u32 (&)[COUNT][4]) {
    cuda_host::wgmma_fence();
}
inline void wgmma(float (&d)[32][4], const u32 (&a)[4], u64 b, int line = __builtin_LINE()) {
    cuda_host::wgmma(&d[0][0], a, b, BF16 ? cuda_host::from_bf16 : cuda_host::from_f16, line);
}
inline void wgmma_wait(int line = __builtin_LINE()) { cuda_host::wgmma_wait(line); }
inline void wgmma_sums(float (&)[32][4]) {}
#endif
