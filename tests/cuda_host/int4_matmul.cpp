// int4_matmul.cu as a library for this machine. The macros are the launch's.
#include "cuda_host.h"

// `extern __shared__` of the text.
alignas(1024) thread_local unsigned char shared[cuda_host::DYNAMIC_BYTES];

#define boxes shared
#include "int4_matmul.cu"

#if WGMMA
CUDA_HOST_LIBRARY(shared, CUDA_HOST_KERNEL(int4_matmul_wgmma_256));
#else
CUDA_HOST_LIBRARY(shared, CUDA_HOST_KERNEL(int4_matmul_few_8), CUDA_HOST_KERNEL(int4_matmul_few_16),
                  CUDA_HOST_KERNEL(int4_gather), CUDA_HOST_KERNEL(int4_matmul_many_64),
                  CUDA_HOST_KERNEL(int4_matmul_many_128), CUDA_HOST_KERNEL(int4_matmul_many_256));
#endif
