//! Whole products of matrices.

use std::ops::Range;

use rayon::prelude::*;

use super::{Line, Operand, Parts, SIDE, Side, Tiles, Values, View, nearest_bf16};

/// Rows and columns of the product that are computed together. With the operands' parts they fit the second-level cache. Rows of a
/// product from a multiple of this on are the same whether they are computed alone or with the others.
pub const BLOCK: usize = 256;
const BLOCK_STRIPS: usize = BLOCK / SIDE;
/// Lines of a strip of both operands that are used before the next ones, for the same reason.
const DEPTH_LINES: usize = 512;
/// Depth laid out together, where sums are added to a matrix.
const DEPTH: usize = 2048;

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
    let tokens = x.len() / m;
    let [x, y] = [(x, m), (y, k)].map(|(x, k)| View::new(Values::BFloat16(x), [tokens, k], [k, 1]));
    let width = if symmetric { rows.end } else { k };
    let (left, right) = (x.part(0..tokens, rows.clone()).transposed(), y.part(0..tokens, 0..width));
    // The diagonal begins at the column with the number of the first row.
    let shape = if symmetric { Shape::Lower { first_row: rows.start } } else { Shape::Full };
    multiply(left, right, Parts::One, Sums { values: &mut matrix[rows.start * k..], stride: k, add, shape });
}

/// Where the sums of a product go: rows of fp32, `stride` values apart.
#[derive(Debug)]
pub struct Sums<'a> {
    /// From the first sum on.
    pub values: &'a mut [f32],
    /// From one row to the next.
    pub stride: usize,
    /// Whether the sums are added to the values.
    pub add: bool,
    /// Which sums are computed.
    pub shape: Shape,
}

/// The part of a product that is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// All of it.
    Full,
    /// The blocks of [`BLOCK`] rows and columns on and below the diagonal, which begins in the column `first_row`.
    Lower {
        /// A multiple of [`BLOCK`].
        first_row: usize,
    },
}

/// `left · right` of `[M, D]` and `[D, N]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn multiply(left: View<'_>, right: View<'_>, parts: Parts, sums: Sums<'_>) {
    let ([m, depth], [_, n]) = (left.size(), right.size());
    assert_eq!(depth, right.size()[0], "operands have one depth");
    let Sums { values, stride, add, shape } = sums;
    for first in (0..depth).step_by(DEPTH) {
        let depth = first..(first + DEPTH).min(depth);
        let left = Operand::new(left.part(0..m, depth.clone()).transposed(), Side::Left, parts);
        let right = Operand::new(right.part(depth, 0..n), Side::Right, parts);
        let add = add || first > 0;
        let operands = [Rows::all(&left), Rows::all(&right)];
        blocks(operands, parts, (&mut *values, stride), [m, n], shape, |row, sums| match add {
            true => add_to(row, sums),
            false => row.copy_from_slice(sums),
        });
    }
}

fn add_to(row: &mut [f32], sums: &[f32]) {
    row.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
}

/// `values[i, j] += Σ_d left[d, i] right[d, j]` over the rows `depth` of a left operand of one part; `right` `[D, N]`, in bf16 or rounded
/// to it, has these rows alone. `values` are `[M, N]`, with `stride` from one row to the next. `depth` begins with a multiple of
/// [`SIDE`], and ends with one or with the operand.
///
/// # Panics
/// When the sizes contradict each other.
pub fn add_rows_product(
    (left, depth): (&Operand, Range<usize>),
    right: View<'_>,
    (values, stride): (&mut [f32], usize),
    m: usize,
) {
    let [own, n] = right.size();
    assert!(own == depth.len() && depth.start.is_multiple_of(SIDE), "operands have one depth");
    assert_eq!(left.strips(), m.div_ceil(SIDE), "[M, D]");
    let right = Operand::new(right, Side::Right, Parts::One);
    let left = Rows { operand: left, chunks: depth.start / SIDE..depth.end.div_ceil(SIDE) };
    blocks([left, Rows::all(&right)], Parts::One, (values, stride), [m, n], Shape::Full, add_to);
}

/// `left · right` of `[M, D]` and `[D, N]`, rounded to bf16: bits `[M, N]`. The right operand is laid out in one part.
///
/// # Panics
/// When the sizes contradict each other.
pub fn multiply_by(left: View<'_>, right: &Operand, n: usize, product: &mut [u16]) {
    let [m, depth] = left.size();
    assert!(right.strips() == n.div_ceil(SIDE) && product.len() == m * n, "[M, D], [D, N] and [M, N]");
    assert_eq!(right.strip_len(), depth.div_ceil(SIDE) * Parts::One.chunk_len(), "operands have one depth");
    let left = Operand::new(left.transposed(), Side::Left, Parts::One);
    let operands = [Rows::all(&left), Rows::all(right)];
    blocks(operands, Parts::One, (product, n), [m, n], Shape::Full, |row, sums| {
        // NaN, whose bits may overflow, stays NaN.
        let round = |sum: f32| if sum.is_nan() { NAN } else { (nearest_bf16(sum) >> 16) as u16 };
        row.iter_mut().zip(sums).for_each(|(c, &sum)| *c = round(sum));
    });
}

/// A bf16 that is not a number.
const NAN: u16 = 0x7FC0;

/// Some chunks of rows of an operand.
#[derive(Debug, Clone)]
struct Rows<'a> {
    operand: &'a Operand,
    chunks: Range<usize>,
}

impl<'a> Rows<'a> {
    fn all(operand: &'a Operand) -> Self {
        Self { operand, chunks: 0..operand.chunk_count() }
    }

    /// Some of its chunks in a strip.
    fn chunks(&self, strip: usize, own: Range<usize>) -> &'a [Line] {
        self.operand.chunks(strip, self.chunks.start + own.start, self.chunks.start + own.end)
    }
}

/// Computes the product `[M, N]` block by block, and gives each row of a block to `put`, with its place in `values`.
fn blocks<T: Send>(
    [left, right]: [Rows<'_>; 2],
    parts: Parts,
    (values, stride): (&mut [T], usize),
    [m, n]: [usize; 2],
    shape: Shape,
    put: impl Fn(&mut [T], &[f32]) + Sync,
) {
    let columns = n.div_ceil(BLOCK);
    let mut places: Vec<Vec<&mut [T]>> = (0..m.div_ceil(BLOCK) * columns).map(|_| Vec::new()).collect();
    for (i, row) in values.chunks_mut(stride.max(1)).enumerate().take(m) {
        for (j, place) in row[..n].chunks_mut(BLOCK).enumerate() {
            places[i / BLOCK * columns + j].push(place);
        }
    }
    let is_computed = |block: usize| match shape {
        Shape::Full => true,
        Shape::Lower { first_row } => block % columns <= first_row / BLOCK + block / columns,
    };
    let places: Vec<_> = places.into_iter().enumerate().filter(|(block, _)| is_computed(*block)).collect();
    places.into_par_iter().for_each_init(block_buffer, |squares, (block, places)| {
        let squares: &mut [f32] = bytemuck::cast_slice_mut(squares);
        product(
            squares,
            &left,
            block / columns * BLOCK_STRIPS,
            &right,
            block % columns * BLOCK_STRIPS,
            parts,
        );
        for (i, place) in places.into_iter().enumerate() {
            for (j, place) in place.chunks_mut(SIDE).enumerate() {
                let square = &squares[square_at(i / SIDE, j)..][..SIDE * SIDE];
                put(place, &square[i % SIDE * SIDE..][..place.len()]);
            }
        }
    });
}

/// The first value of a square in a block, whose squares lie one after another.
fn square_at(row: usize, column: usize) -> usize {
    (column * BLOCK_STRIPS + row) * SIDE * SIDE
}

/// `[BLOCK, BLOCK]` of a product, of the strips from `i` of `left` and from `j` of `right` on, square by square.
fn product(squares: &mut [f32], left: &Rows<'_>, i: usize, right: &Rows<'_>, j: usize, parts: Parts) {
    let strips = |of: &Rows<'_>, first: usize| (of.operand.strips() - first).min(BLOCK_STRIPS);
    let (chunks, step) = (left.chunks.len(), DEPTH_LINES / parts.chunk_len());
    squares.fill(0.0);
    let tiles = Tiles::new();
    for first in (0..chunks).step_by(step) {
        let end = (first + step).min(chunks);
        for column in 0..strips(right, j) {
            let right = right.chunks(j + column, first..end);
            for row in 0..strips(left, i) {
                let c = &mut squares[square_at(row, column)..][..SIDE * SIDE];
                tiles.multiply_add(left.chunks(i + row, first..end), right, parts, c, SIDE);
            }
        }
    }
}

/// `[BLOCK, BLOCK]` floats, aligned for tile registers.
fn block_buffer() -> Vec<Line> {
    bytemuck::zeroed_vec(BLOCK * BLOCK * size_of::<f32>() / size_of::<Line>())
}
