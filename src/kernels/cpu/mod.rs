//! Products with packed weights on the CPU.

mod by_group;
mod dequantize;
mod few_rows;
mod fixed_point;
#[cfg(test)]
pub(super) mod fixture;
mod matmul;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
mod unpack;

pub use by_group::CpuMatmul;
pub use dequantize::dequantize_into;
