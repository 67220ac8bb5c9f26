// mistakes.cu as a library for this machine.
#include "cuda_host.h"

alignas(1024) thread_local float memory[cuda_host::DYNAMIC_BYTES / sizeof(float)];

#include "mistakes.cu"

CUDA_HOST_LIBRARY(memory, CUDA_HOST_KERNEL(exchange), CUDA_HOST_KERNEL(warp_exchange), CUDA_HOST_KERNEL(overwrite),
                  CUDA_HOST_KERNEL(copied), CUDA_HOST_KERNEL(barrier_in_branch), CUDA_HOST_KERNEL(lane_missing),
                  CUDA_HOST_KERNEL(touch), CUDA_HOST_KERNEL(beyond_shared), CUDA_HOST_KERNEL(undefined),
                  CUDA_HOST_KERNEL(hand_over), CUDA_HOST_KERNEL(same_word), CUDA_HOST_KERNEL(boxes),
                  CUDA_HOST_KERNEL(numbers));
