// gptq_block.cu as a library for this machine.
#include "cuda_host.h"

// `extern __shared__` of the text.
alignas(1024) thread_local float memory[cuda_host::DYNAMIC_BYTES / sizeof(float)];

#include "gptq_block.cu"

CUDA_HOST_LIBRARY(memory, CUDA_HOST_KERNEL(gptq_solve_fitted),
                  CUDA_HOST_KERNEL(gptq_solve_searched),
                  CUDA_HOST_KERNEL(gptq_solve_given),
                  CUDA_HOST_KERNEL(gptq_compensate),
                  CUDA_HOST_KERNEL(gptq_fit_static),
                  CUDA_HOST_KERNEL(gptq_search_static),
                  CUDA_HOST_KERNEL(gptq_rounding_costs),
                  CUDA_HOST_KERNEL(gptq_pack),
                  CUDA_HOST_KERNEL(gptq_reorder_hessian),
                  CUDA_HOST_KERNEL(gptq_stack_f32),
                  CUDA_HOST_KERNEL(gptq_stack_f16),
                  CUDA_HOST_KERNEL(gptq_stack_bf16),
                  CUDA_HOST_KERNEL(gptq_dequantize_f32),
                  CUDA_HOST_KERNEL(gptq_dequantize_f16),
                  CUDA_HOST_KERNEL(gptq_dequantize_bf16));
