//! Whole products: sums over tokens of outer products.

use std::ops::Range;

use rayon::prelude::*;

use super::{Line, Operand, Parts, SIDE, Side, multiply_add, operand::fill_from_bf16};

/// Rows and columns of the product that are computed together. With the operands' parts they fit the second-level cache. Rows of a
/// product from a multiple of this on are the same whether they are computed alone or with the others.
pub const BLOCK: usize = 256;
const BLOCK_STRIPS: usize = BLOCK / SIDE;
/// Chunks of both operands that are used before the next ones, for the same reason.
const DEPTH_CHUNKS: usize = 16;
/// Tokens laid out together.
const TOKENS: usize = 2048;

/// `matrix[i, j] = Σ_t x[t, i] x[t, j]` for the `rows` `i`, all `j ≤ i` and some more, or `+=` if `add`; `matrix` `[K, K]`, `x` `[T, K]`
/// bf16 bits. `rows` begin with a multiple of [`BLOCK`], and end with one or with `K`.
///
/// # Panics
/// When the lengths contradict each other.
pub fn gram(matrix: &mut [f32], k: usize, rows: Range<usize>, x: &[u16], add: bool) {
    accumulate(matrix, k, rows, [x, x], add, true);
}

/// `matrix[i, j] = Σ_t x[t, i] y[t, j]` for the `rows` `i`, or `+=` if `add`; `matrix` `[M, K]`, `x` `[T, M]` and `y` `[T, K]` bf16 bits.
/// `rows` as for [`gram`].
///
/// # Panics
/// When the lengths contradict each other.
pub fn cross_gram(matrix: &mut [f32], k: usize, rows: Range<usize>, x: &[u16], y: &[u16], add: bool) {
    accumulate(matrix, k, rows, [x, y], add, false);
}

/// Some rows of `xᵀ y`; of a symmetric product only the blocks on and below the diagonal.
fn accumulate(
    matrix: &mut [f32],
    k: usize,
    rows: Range<usize>,
    [x, y]: [&[u16]; 2],
    add: bool,
    symmetric: bool,
) {
    assert!(k > 0 && !matrix.is_empty() && matrix.len().is_multiple_of(k), "[M, K]");
    let m = matrix.len() / k;
    assert!(x.len().is_multiple_of(m) && y.len() == x.len() / m * k, "as many tokens on both sides");
    assert!(
        rows.start.is_multiple_of(BLOCK) && (rows.end == m || rows.end.is_multiple_of(BLOCK)),
        "whole blocks"
    );
    let (matrix, width) = (&mut matrix[rows.start * k..rows.end * k], if symmetric { rows.end } else { k });
    let first_block = rows.start / BLOCK;
    for (i, (x, y)) in x.chunks(TOKENS * m).zip(y.chunks(TOKENS * k)).enumerate() {
        let add = add || i > 0;
        let (left, right) = (operand(x, m, rows.clone(), Side::Left), operand(y, k, 0..width, Side::Right));
        // The last rows of a triangle have the most columns; beginning with them, threads end together.
        let blocks = matrix.par_chunks_mut(BLOCK * k).enumerate().rev();
        blocks.for_each_init(block_buffer, |square, (block, rows)| {
            let square = bytemuck::cast_slice_mut(square);
            let end = if symmetric { k.min((first_block + block + 1) * BLOCK) } else { k };
            for first in (0..end).step_by(BLOCK) {
                product(square, &left, block * BLOCK_STRIPS, &right, first / SIDE);
                let width = BLOCK.min(k - first);
                for (row, sums) in rows.chunks_mut(k).zip(square.chunks(BLOCK)) {
                    let row = &mut row[first..first + width];
                    if add {
                        row.iter_mut().zip(sums).for_each(|(h, sum)| *h += sum);
                    } else {
                        row.copy_from_slice(&sums[..width]);
                    }
                }
            }
        });
    }
}

/// `[BLOCK, BLOCK]` of a product in one part, of the strips from `i` of `left` and from `j` of `right` on.
fn product(square: &mut [f32], left: &Operand, i: usize, right: &Operand, j: usize) {
    let (rows, columns) = ((left.strips() - i).min(BLOCK_STRIPS), (right.strips() - j).min(BLOCK_STRIPS));
    let chunks = left.strip_len() / Parts::One.chunk_len();
    square.fill(0.0);
    for first in (0..chunks).step_by(DEPTH_CHUNKS) {
        let end = (first + DEPTH_CHUNKS).min(chunks);
        for column in 0..columns {
            let right = right.chunks(j + column, first, end);
            for row in 0..rows {
                let c = &mut square[row * SIDE * BLOCK + column * SIDE..];
                multiply_add(left.chunks(i + row, first, end), right, Parts::One, c, BLOCK);
            }
        }
    }
}

/// Some columns of `x` `[T, K]` as an operand.
fn operand(x: &[u16], k: usize, columns: Range<usize>, side: Side) -> Operand {
    let mut operand = Operand::zeros(x.len() / k, columns.len(), Parts::One);
    let (strip, chunk) = (operand.strip_len(), Parts::One.chunk_len());
    operand.lines_mut().par_chunks_mut(strip).enumerate().for_each(|(i, strip)| {
        let first = columns.start + i * SIDE;
        let columns = first..(first + SIDE).min(columns.end);
        for (chunk, x) in strip.chunks_exact_mut(chunk).zip(x.chunks(SIDE * k)) {
            let rows: Vec<&[u16]> = x.chunks(k).map(|row| &row[columns.clone()]).collect();
            fill_from_bf16(chunk, side, &rows);
        }
    });
    operand
}

/// `[BLOCK, BLOCK]` floats, aligned for tile registers.
fn block_buffer() -> Vec<Line> {
    bytemuck::zeroed_vec(BLOCK * BLOCK * size_of::<f32>() / size_of::<Line>())
}
