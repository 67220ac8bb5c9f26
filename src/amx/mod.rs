//! Matrix products of bf16 values with fp32 sums: on the processor's matrix unit (Intel AMX), or with the bf16 dot products of AVX-512
//! (AMD from Zen 4 on, Intel Cooper Lake).
//!
//! libtorch's own bf16 product rounds its result to bf16, which is too inexact for a Hessian; with fp32 operands it is eight
//! times slower. Here operands are laid out once ([`Operand`]) and multiplied block by block with fp32 sums
//! ([`Tiles::multiply_add`]). An fp32 matrix is multiplied as two bf16 matrices, the rounded value and the rounded rest
//! ([`Parts::Two`]): 16 bits of significand in three eighths of the time of fp32.
//!
//! A product is `C[m, n] += Σ_d X[d, m] · Y[d, n]`, with `X` the left and `Y` the right operand and `d` their common depth, so
//! that no operand need be transposed. Sums are in the order of `d`, independent of the number of threads.

mod forms;
mod operand;
#[cfg(test)]
mod tests;
mod tiles;

pub use forms::{BLOCK, Shape, Sums, add_rows_product, cross_gram, gram, multiply, multiply_by};
pub use operand::{Line, Operand, Parts, Side, Square, Values, View, fill_from_f32, nearest_bf16};
pub use tiles::{Tiles, available, has_bf16_products};

/// Columns of an operand's strip, rows of its chunk, and side of the square of `C` that is computed at once.
pub const SIDE: usize = 32;
