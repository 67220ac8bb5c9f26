//! Products with packed weights on CUDA: the kernels (`int4_matmul.cu`), their layout, compilation and launches.

#[cfg(test)]
mod device_tests;
pub mod layout;
mod matmul;
pub mod plan;
mod repack;

use crate::cuda::Source;
pub use matmul::{CudaMatmul, Workspace};
pub use repack::{Features, RepackError, Repacked, repack, repacked_bytes};

/// The kernels of products with packed weights.
pub const INT4_MATMUL: Source = Source { name: "int4_matmul.cu", text: include_str!("int4_matmul.cu") };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::entries_by_generation;

    #[test]
    fn the_product_compiles_for_every_generation_with_nvrtc() {
        assert!(entries_by_generation(&INT4_MATMUL).iter().all(|entries| !entries.is_empty()));
    }
}
