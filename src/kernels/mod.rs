//! Arithmetic on packed weights, without a dense copy of them.

mod cpu;
pub mod cuda;

pub use cpu::{CpuMatmul, dequantize_into};
pub use cuda::{CudaMatmul, Features, RepackError, Repacked, Workspace, repack, repacked_bytes};
