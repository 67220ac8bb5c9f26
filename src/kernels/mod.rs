//! Arithmetic on packed weights, without a dense copy of them.

mod cpu_dequantize;
mod cpu_few_rows;
#[cfg(test)]
mod cpu_fixture;
mod cpu_matmul;
mod cpu_simd;
#[cfg(target_arch = "x86_64")]
mod cpu_simd_x86;
mod cpu_unpack;
#[cfg(test)]
mod cuda_device_tests;
pub mod cuda_layout;
mod cuda_matmul;
pub mod cuda_plan;
mod cuda_repack;

pub use cpu_dequantize::dequantize_into;
pub use cpu_matmul::matmul;
pub use cuda_matmul::{CudaMatmul, Workspace};
pub use cuda_repack::{Features, RepackError, Repacked, repack, repacked_bytes};
