// The instructions of gptq_block.cu, included by it.
#pragma once

inline Half nearest_half(double value) { return {cuda_host::to_f16(value)}; }
inline float widen(Half value) { return cuda_host::from_f16(value.bits); }

inline void copy_16(float* to, const float* from, int bytes, int line = __builtin_LINE()) {
    cuda_host::copy_async(to, from, 16, (unsigned)bytes, line);
}
inline void copy_4(float* to, const float* from, int bytes, int line = __builtin_LINE()) {
    cuda_host::copy_async(to, from, 4, (unsigned)bytes, line);
}
inline void commit() { cuda_host::commit_copies(); }
template <int PENDING>
inline void wait() {
    cuda_host::wait_for_copies(PENDING);
}
