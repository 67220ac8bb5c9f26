//! Whole products: a Hessian from its inputs, and a quadratic form.

use rayon::prelude::*;

use super::{
    Line, Operand, Parts, SIDE, multiply_add,
    operand::{fill_both_from_bf16, fill_left_rounded, fill_right_from_transposed, right_values},
};

/// Rows and columns of the product that are computed together: with the operands' parts they fit the second cache.
const BLOCK: usize = 256;
const BLOCK_STRIPS: usize = BLOCK / SIDE;
/// Chunks of both operands that are used before the next ones, for the same reason.
const DEPTH_CHUNKS: usize = 16;
/// Tokens laid out together.
const TOKENS: usize = 2048;

/// `matrix[i, j] = Σ_t x[t, i] x[t, j]` for all `j ≤ i` and some more, or `+=` if `add`; `matrix` `[K, K]`, `x` `[T, K]`
/// bf16 bits.
///
/// # Panics
/// When the lengths contradict each other.
pub fn gram(matrix: &mut [f32], k: usize, x: &[u16], add: bool) {
    assert!(k > 0 && matrix.len() == k * k && x.len().is_multiple_of(k), "[K, K] and [T, K]");
    for (i, x) in x.chunks(TOKENS * k).enumerate() {
        let add = add || i > 0;
        let (left, right) = both_sides(x, k);
        // The last rows have the most columns; beginning with them, threads end together.
        let blocks = matrix.par_chunks_mut(BLOCK * k).enumerate().rev();
        blocks.for_each_init(block_buffer, |square, (block, rows)| {
            let square = bytemuck::cast_slice_mut(square);
            for first in (0..=block * BLOCK).step_by(BLOCK) {
                product(square, &left, block * BLOCK_STRIPS, &right, first / SIDE, 0);
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

/// `[BLOCK, BLOCK]` of a product in one part, from the strips `i` of `left` and `j` of `right` on, as far as there are. The
/// depth of `left` begins `skipped` chunks into that of `right`.
fn product(square: &mut [f32], left: &Operand, i: usize, right: &Operand, j: usize, skipped: usize) {
    let (rows, columns) = ((left.strips() - i).min(BLOCK_STRIPS), (right.strips() - j).min(BLOCK_STRIPS));
    let chunks = left.strip_len() / Parts::One.chunk_len();
    square.fill(0.0);
    for first in (0..chunks).step_by(DEPTH_CHUNKS) {
        let end = (first + DEPTH_CHUNKS).min(chunks);
        for column in 0..columns {
            let right = right.chunks(j + column, skipped + first, skipped + end);
            for row in 0..rows {
                let c = &mut square[row * SIDE * BLOCK + column * SIDE..];
                multiply_add(left.chunks(i + row, first, end), right, Parts::One, c, BLOCK);
            }
        }
    }
}

fn both_sides(x: &[u16], k: usize) -> (Operand, Operand) {
    let tokens = x.len() / k;
    let operand = || Operand::zeros(tokens, k, Parts::One);
    let (mut left, mut right) = (operand(), operand());
    let (strip, chunk) = (left.strip_len(), Parts::One.chunk_len());
    let strips = left.lines_mut().par_chunks_mut(strip).zip(right.lines_mut().par_chunks_mut(strip));
    strips.enumerate().for_each(|(i, (left, right))| {
        let columns = i * SIDE..((i + 1) * SIDE).min(k);
        let chunks = left.chunks_exact_mut(chunk).zip(right.chunks_exact_mut(chunk));
        for ((left, right), x) in chunks.zip(x.chunks(SIDE * k)) {
            let rows: Vec<&[u16]> = x.chunks(k).map(|row| &row[columns.clone()]).collect();
            fill_both_from_bf16(left, right, &rows);
        }
    });
    (left, right)
}

/// `Σ_n w_n H w_nᵀ` over the rows of a weight `[N, K]`, which `widen` makes fp32; `h` `[K, K]`, symmetric, of which only the
/// blocks on and below the diagonal are read. Both are rounded to bf16. The sum's order does not depend on the number of
/// threads.
///
/// # Panics
/// When the lengths contradict each other.
pub fn quadratic_form<R: Sync>(
    h: &[f32],
    k: usize,
    weight: &[R],
    widen: impl Fn(&R, &mut [f32]) + Sync,
) -> f64 {
    assert!(k > 0 && h.len() == k * k, "[K, K]");
    let weight = transposed(weight, k, widen);
    let mut sum = 0.0;
    for first in (0..k).step_by(BLOCK) {
        let left = lower_columns(h, k, first);
        let skipped = first / SIDE;
        let blocks = (0..weight.strips()).into_par_iter().step_by(BLOCK_STRIPS);
        let sums = blocks.map_init(block_buffer, |square, block| {
            let square: &mut [f32] = bytemuck::cast_slice_mut(square);
            product(square, &left, 0, &weight, block, skipped);
            let strips = block..(block + BLOCK_STRIPS).min(weight.strips());
            let mut sums = [0.0f64; 16];
            for (column, strip) in strips.enumerate() {
                for d in 0..BLOCK.min(k - first) {
                    let at = skipped + d / SIDE;
                    for half in 0..2 {
                        let w = right_values(weight.chunks(strip, at, at + 1), d % SIDE, half);
                        let product = &square[d * BLOCK + column * SIDE + half * 16..][..16];
                        sums.iter_mut()
                            .zip(w.iter().zip(product))
                            .for_each(|(s, (w, p))| *s += f64::from(w * p));
                    }
                }
            }
            sums.iter().sum::<f64>()
        });
        sum += sums.collect::<Vec<f64>>().iter().sum::<f64>();
    }
    sum
}

/// `[BLOCK, BLOCK]` floats, aligned as tile registers want them.
fn block_buffer() -> Vec<Line> {
    bytemuck::zeroed_vec(BLOCK * BLOCK * size_of::<f32>() / size_of::<Line>())
}

/// `weightᵀ` `[K, N]` as a right operand.
fn transposed<R: Sync>(weight: &[R], k: usize, widen: impl Fn(&R, &mut [f32]) + Sync) -> Operand {
    let mut right = Operand::zeros(k, weight.len(), Parts::One);
    let (strip, chunk) = (right.strip_len(), Parts::One.chunk_len());
    right.lines_mut().par_chunks_mut(strip).zip(weight.par_chunks(SIDE)).for_each_init(
        || vec![0.0; SIDE * k],
        |wide, (strip, rows)| {
            rows.iter().zip(wide.chunks_mut(k)).for_each(|(row, wide)| widen(row, wide));
            for (i, chunk) in strip.chunks_exact_mut(chunk).enumerate() {
                let columns = i * SIDE..((i + 1) * SIDE).min(k);
                let rows: Vec<&[f32]> =
                    wide.chunks(k).take(rows.len()).map(|row| &row[columns.clone()]).collect();
                fill_right_from_transposed(chunk, &rows);
            }
        },
    );
    right
}

/// Columns `first..first + BLOCK` of the rows of `h` from `first` on, as a left operand. Rows below the block on the diagonal
/// count twice, for the elements above the diagonal that they stand for too.
fn lower_columns(h: &[f32], k: usize, first: usize) -> Operand {
    let width = BLOCK.min(k - first);
    let mut left = Operand::zeros(k - first, width, Parts::One);
    let (strip, chunk) = (left.strip_len(), Parts::One.chunk_len());
    left.lines_mut().par_chunks_mut(strip).enumerate().for_each(|(i, strip)| {
        let columns = first + i * SIDE..(first + (i + 1) * SIDE).min(first + width);
        for (chunk, d) in strip.chunks_exact_mut(chunk).zip((first..k).step_by(SIDE)) {
            let mut square = [[0.0; SIDE]; SIDE];
            let depth = SIDE.min(k - d);
            for (row, d) in square.iter_mut().zip(d..d + depth) {
                let factor = if d < first + width { 1.0 } else { 2.0 };
                row.iter_mut().zip(&h[d * k..][columns.clone()]).for_each(|(to, h)| *to = factor * h);
            }
            let rows: Vec<&[f32]> = square[..depth].iter().map(|row| &row[..columns.len()]).collect();
            fill_left_rounded(chunk, &rows);
        }
    });
    left
}
