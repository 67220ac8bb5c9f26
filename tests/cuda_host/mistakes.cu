// Kernels that do one thing right or, when they are told to, wrong: what the machine is for must be seen by it.

// Each thread reads what another has written.
extern "C" __global__ void exchange(int* out, int wrong) {
    extern __shared__ float memory[];
    const int thread = threadIdx.x;
    memory[thread] = (float)thread;
    if (!wrong) __syncthreads();
    out[thread] = (int)memory[thread ^ 32]; // races
}

// The same within a warp.
extern "C" __global__ void warp_exchange(int* out, int wrong) {
    extern __shared__ float memory[];
    const int thread = threadIdx.x;
    memory[thread] = (float)thread;
    if (!wrong) __syncwarp();
    out[thread] = (int)memory[thread ^ 1]; // races within a warp
}

// Each thread writes again what another may still read.
extern "C" __global__ void overwrite(int* out, int wrong) {
    __shared__ int words[64];
    const int thread = threadIdx.x;
    words[thread] = thread;
    __syncthreads();
    out[thread] = words[63 - thread];
    if (!wrong) __syncthreads();
    words[thread] = -1;
}

// An asynchronous copy. 1: not waited for; 2: one group too few; 3: no barrier for the other threads; 4: its source is
// written meanwhile; 5: nobody waits.
extern "C" __global__ void copied(int* values, int* out, int wrong) {
    __shared__ __align__(16) int words[128];
    const int thread = threadIdx.x;
    cuda_host::copy_async(words + thread, values + thread, 4, 4, __LINE__);
    cuda_host::commit_copies();
    cuda_host::copy_async(words + 64 + thread, values, 4, 0, __LINE__);
    cuda_host::commit_copies();
    if (wrong == 5) return;
    if (wrong == 4) values[thread] += 1;
    if (wrong != 1) cuda_host::wait_for_copies(wrong == 2 ? 2 : 1);
    if (wrong != 3) __syncthreads();
    out[thread] = words[63 - thread];
    cuda_host::wait_for_copies(0);
    __syncthreads();
    out[thread] += words[64 + 63 - thread];
}

extern "C" __global__ void barrier_in_branch(int* out, int wrong) {
    if (wrong && threadIdx.x >= 40) {
        __syncthreads(); // the last
    } else {
        __syncthreads(); // the first
    }
    out[threadIdx.x] = 1;
}

// 1: half of a warp meets nobody; 2: it is elsewhere.
extern "C" __global__ void lane_missing(int* out, int wrong) {
    if (wrong == 1 && threadIdx.x % 32 >= 16) return;
    if (wrong == 2 && threadIdx.x % 32 >= 16) {
        __syncwarp();
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = 1;
}

// Reads `from` and writes `to`, at an offset.
extern "C" __global__ void touch(const int* from, int* to, int read, int write) {
    if (threadIdx.x == 5) to[write] = from[read]; // anywhere
}

extern "C" __global__ void beyond_shared(int* out, int floats) {
    extern __shared__ float memory[];
    memory[floats - 1 - threadIdx.x] = 1;
    out[threadIdx.x] = 1;
}

// 1: a sum overflows; 2: a shift is too wide; 3: a vector is not aligned; 4: an index.
extern "C" __global__ void undefined(int* out, int wrong) {
    __shared__ float4 vectors[2];
    __shared__ int row[8];
    if (threadIdx.x != 0) return;
    vectors[0] = {1, 2, 3, 4};
    int value = 1;
    if (wrong == 1) value = 0x7fffffff + wrong; // a sum
    if (wrong == 2) value = wrong << (30 + wrong); // a shift
    if (wrong == 3) value = (int)((const float4*)((const float*)vectors + 1))->x; // a vector
    if (wrong == 4) value = row[wrong * 2]; // an index
    out[0] = value;
}

// The first block hands a value to the others. 1: no fence before the word is changed; 2: the word is read without
// acquiring; 3: no barrier between the values and the fence; 4: one arrival too few.
extern "C" __global__ void hand_over(unsigned* word, int* value, int* out, int wrong) {
    const int thread = threadIdx.x;
    if (blockIdx.x == 0) {
        value[thread] = 100 + thread;
        if (wrong != 3) __syncthreads();
        if (thread == 0) {
            if (wrong != 1) __threadfence();
            if (wrong != 4) atomicAdd(word, 1);
        }
    } else {
        if (thread == 0) {
            if (wrong == 2) {
                while (atomicAdd(word, 0) == 0) cuda_host::load_acquire(word + 1);
            } else {
                while (cuda_host::load_acquire(word) == 0) {
                }
            }
        }
        __syncthreads();
        out[(blockIdx.x - 1) * 64 + thread] = value[63 - thread];
    }
}

// Every block writes the same.
extern "C" __global__ void same_word(int* out, int wrong) { out[wrong ? 0 : blockIdx.x * 64 + threadIdx.x] = 1; }

struct Map {
    unsigned long long opaque[16];
};

// Two boxes one after another to the same memory, copied by the last warp and multiplied by the four before it; out [128] gets
// sums. 1: the box is not waited for; 2: its reader is not; 3: no fence before the product; 4: its registers change; 5: fewer bytes
// are expected; 6: the product is not waited for; 7: a lane arrives for its warp, which it has not waited for; 8: the barrier
// is not published; 9: the last box is not used; 10: more bytes are expected.
extern "C" __global__ void boxes(Map map, float* out, int wrong) {
    extern __shared__ float memory[];
    const unsigned box = cuda_host::shared_address(memory), full = box + 32768, empty = full + 8;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        cuda_host::barrier_init(full, 1, __LINE__);
        cuda_host::barrier_init(empty, 4, __LINE__);
        if (wrong != 8) cuda_host::barrier_publish();
    }
    __syncthreads();
    if (warp == 4) {
        for (unsigned i = 0; i < 2 && lane == 0; ++i) {
            if (i > 0 && wrong != 2) cuda_host::barrier_wait(empty, 0, __LINE__);
            cuda_host::barrier_arrive(full, 32768 + (wrong == 5 ? -16 : wrong == 10 ? 16 : 0), __LINE__);
            cuda_host::copy_box(box, &map, i * 64, 0, full, __LINE__);
        }
        return;
    }
    float d[128] = {};
    unsigned a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    const unsigned long long descriptor = 1ull << 62 | 64ull << 32 | 1ull << 16 | box / 16;
    for (unsigned i = 0; i < (wrong == 9 ? 1u : 2u); ++i) {
        if (wrong != 1) cuda_host::barrier_wait(full, i, __LINE__);
        if (wrong != 3) cuda_host::wgmma_fence();
        cuda_host::wgmma(d, a, descriptor, cuda_host::from_f16, __LINE__);
        if (wrong == 4) a[2] += 1;
        if (wrong != 6) cuda_host::wgmma_wait(__LINE__);
        if (wrong != 7) __syncwarp();
        if (lane == 0) cuda_host::barrier_arrive(empty, 0, __LINE__);
    }
    out[threadIdx.x] = d[4] + d[5];
}

// 16-bit arithmetic, for its own test.
extern "C" __global__ void numbers(const unsigned short* a, const unsigned short* b, const unsigned short* c,
                                   const double* wide, unsigned short* out, int count) {
    for (int i = threadIdx.x; i < count; i += 32) {
        out[4 * i] = cuda_host::fma_f16(a[i], b[i], c[i]);
        out[4 * i + 1] = cuda_host::fma_bf16(a[i], b[i], c[i]);
        out[4 * i + 2] = cuda_host::to_f16(wide[i]);
        out[4 * i + 3] = cuda_host::to_bf16(wide[i]);
    }
}
