//! The method: Hessians of calibration inputs, column orders, quantization grids and the solvers.
//!
//! Letters used here and below: `N` output features, `K` input features, `G` groups, `T` tokens,
//! `H` the Hessian `[K, K]`, `W` a weight `[N, K]`, `Ũ` the upper triangular factor with `H + λI = Ũ Ũᵀ`.

mod block_linear;
mod cross_covariance;
mod grid;
mod hessian;
mod order;
mod output_hessian;
mod quantized;
mod raw;
mod shrinkage;
pub mod solver;
mod tensor_cores;

pub use block_linear::BlockLinear;
pub use cross_covariance::CrossCovariance;
pub use grid::{Grid, Step};
pub use hessian::Hessian;
#[cfg(test)]
pub(crate) use hessian::fault;
pub use order::{ColumnOrder, dead_columns, mean_alive};
pub use output_hessian::{OutputHessian, output_blocks};
pub use quantized::QuantizedLinear;
