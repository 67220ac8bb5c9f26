//! Operands in the layout of tile registers.

use std::ops::Range;

use rayon::prelude::*;

use super::SIDE;

/// A row of a tile register: one cache line, 32 bf16 values in pairs, the first of a pair in the low half.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Line(pub(super) [u32; 16]);

/// Lines of a tile register.
pub(super) const TILE: usize = 16;
/// Lines of one part of a chunk, [`SIDE`] rows of [`SIDE`] columns: two tiles, of 16 columns each.
pub(super) const CHUNK: usize = 2 * TILE;

/// Strips that are laid out together: a row of theirs is some cache lines of a row-major matrix, which processors fetch faster than
/// single ones.
const TOGETHER: usize = 8;

/// Number of bf16 values that represent a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// The value is bf16.
    One,
    /// The value rounded to bf16, and the rest rounded to bf16.
    Two,
}

impl Parts {
    /// Their number.
    pub fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// Lines of a chunk.
    pub fn chunk_len(self) -> usize {
        CHUNK * self.count()
    }

    /// Which parts of both operands are multiplied. The product of the two rests is below the rounding of the rests.
    pub(super) fn products(self) -> &'static [(usize, usize)] {
        match self {
            Self::One => &[(0, 0)],
            Self::Two => &[(0, 0), (0, 1), (1, 0)],
        }
    }
}

/// The two places in a product. A left tile has a line for each column, a right tile one for each pair of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `X`: its columns become rows of the product.
    Left,
    /// `Y`.
    Right,
}

/// A matrix `[depth, columns]`, laid out in strips of [`SIDE`] columns, each in chunks of [`SIDE`] rows, each in parts.
/// Places that are not filled are zero.
#[derive(Debug)]
pub struct Operand {
    lines: Vec<Line>,
    strip: usize,
    parts: Parts,
}

impl Operand {
    /// An operand of `depth` rows of `columns`, all zero.
    pub fn zeros(depth: usize, columns: usize, parts: Parts) -> Self {
        let strip = depth.div_ceil(SIDE) * parts.chunk_len();
        Self { lines: bytemuck::zeroed_vec(strip * columns.div_ceil(SIDE)), strip, parts }
    }

    /// The strip of the columns from `SIDE·index` on.
    pub fn strip(&self, index: usize) -> &[Line] {
        &self.lines[self.strip * index..][..self.strip]
    }

    /// Chunks `first..end` of a strip.
    pub fn chunks(&self, index: usize, first: usize, end: usize) -> &[Line] {
        let chunk = self.parts.chunk_len();
        &self.strip(index)[first * chunk..end * chunk]
    }

    /// Number of strips.
    pub fn strips(&self) -> usize {
        self.lines.len().checked_div(self.strip).unwrap_or(0)
    }

    /// Number of chunks of a strip.
    pub fn chunk_count(&self) -> usize {
        self.strip / self.parts.chunk_len()
    }

    /// Lines of a strip.
    pub fn strip_len(&self) -> usize {
        self.strip
    }

    /// All strips, one after another.
    pub fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
    }
}

/// A square of fp32 values, `[row][column]`.
pub type Square = [[f32; SIDE]; SIDE];

/// Lays out a square as a chunk.
pub fn fill_from_f32(chunk: &mut [Line], side: Side, parts: Parts, square: &Square) {
    let values = square.as_flattened();
    fill(chunk, side, parts, values, &View::new(Values::Float(values), [SIDE, SIDE], [SIDE, 1]));
}

/// The nearest bf16 value, ties to even, as the bits of an fp32 value.
///
/// For numbers only: it has no branch for NaN, as `half`'s conversion has, so that it vectorizes.
#[inline(always)]
pub fn nearest_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000
}

/// A matrix `[rows, columns]` in memory, of bf16 (as bits) or fp32.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    values: Values<'a>,
    size: [usize; 2],
    /// Values from one row to the next, and from one column to the next.
    strides: [usize; 2],
}

/// The memory of a [`View`].
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Bits of bf16.
    BFloat16(&'a [u16]),
    /// fp32.
    Float(&'a [f32]),
}

impl<'a> View<'a> {
    /// A matrix `[rows, columns]` with the strides `[row, column]` in values, one of which is 1.
    ///
    /// # Panics
    /// When both strides are larger than 1, or the matrix ends behind the values.
    pub fn new(values: Values<'a>, size: [usize; 2], strides: [usize; 2]) -> Self {
        let count = match values {
            Values::BFloat16(values) => values.len(),
            Values::Float(values) => values.len(),
        };
        let empty = size.contains(&0);
        let last = if empty { 0 } else { (size[0] - 1) * strides[0] + (size[1] - 1) * strides[1] };
        assert!(strides.contains(&1), "rows or columns are contiguous");
        assert!(empty || last < count, "the matrix lies in the values");
        Self { values, size, strides }
    }

    /// The same matrix with rows as columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        let ([rows, columns], [row, column]) = (self.size, self.strides);
        Self { size: [columns, rows], strides: [column, row], ..self }
    }

    /// `[rows, columns]`.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// Some rows and columns.
    ///
    /// # Panics
    /// When the matrix has fewer.
    #[must_use]
    pub fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.size[0] && columns.end <= self.size[1], "the part lies in the matrix");
        let first = rows.start * self.strides[0] + columns.start * self.strides[1];
        let values = match self.values {
            Values::BFloat16(values) => Values::BFloat16(values.get(first..).unwrap_or_default()),
            Values::Float(values) => Values::Float(values.get(first..).unwrap_or_default()),
        };
        Self { values, size: [rows.len(), columns.len()], ..self }
    }
}

impl Operand {
    /// The operand of a matrix `[depth, columns]`; fp32 values are rounded, or taken in two parts.
    pub fn new(matrix: View<'_>, side: Side, parts: Parts) -> Self {
        let [depth, columns] = matrix.size;
        let mut operand = Self::zeros(depth, columns, parts);
        operand.set_rows(0, matrix, side);
        operand
    }

    /// Lays out a matrix `[rows, columns]` as the rows from `first` on.
    ///
    /// # Panics
    /// When `first` is not a multiple of [`SIDE`], or the operand has fewer rows or another number of columns.
    pub fn set_rows(&mut self, first: usize, matrix: View<'_>, side: Side) {
        let ([rows, columns], parts, len) = (matrix.size, self.parts, self.parts.chunk_len());
        let (own, chunks) = (self.strip.max(1), first / SIDE..(first + rows).div_ceil(SIDE));
        assert!(first.is_multiple_of(SIDE) && chunks.end * len <= self.strip, "the operand has the rows");
        assert_eq!(columns.div_ceil(SIDE), self.strips(), "all columns");
        self.lines.par_chunks_mut(own * TOGETHER).enumerate().for_each(|(group, strips)| {
            for d in chunks.clone() {
                let row = d * SIDE - first;
                for (i, strip) in strips.chunks_mut(own).enumerate() {
                    let column = (group * TOGETHER + i) * SIDE;
                    let part = matrix.part(row..(row + SIDE).min(rows), column..(column + SIDE).min(columns));
                    let chunk = &mut strip[d * len..][..len];
                    match part.values {
                        Values::BFloat16(values) => fill(chunk, side, parts, values, &part),
                        Values::Float(values) => fill(chunk, side, parts, values, &part),
                    }
                }
            }
        });
    }
}

/// What an operand's parts are made of.
trait Value: Copy + Default {
    /// A part of some values: its bits, in the high half.
    fn part<const N: usize>(values: &[Self; N], part: usize) -> [u32; N];

    /// Pairs of neighbours, the first in the low half.
    #[inline(always)]
    fn neighbours(values: &[Self; SIDE], part: usize) -> [u32; TILE] {
        let bits = Self::part(values, part);
        std::array::from_fn(|i| bits[2 * i] >> 16 | bits[2 * i + 1])
    }
}

impl Value for u16 {
    #[inline(always)]
    fn part<const N: usize>(values: &[Self; N], part: usize) -> [u32; N] {
        assert_eq!(part, 0, "bf16 is one part");
        values.map(|value| u32::from(value) << 16)
    }

    #[inline(always)]
    fn neighbours(values: &[Self; SIDE], _: usize) -> [u32; TILE] {
        const { assert!(cfg!(target_endian = "little")) };
        bytemuck::cast(*values)
    }
}

impl Value for f32 {
    #[inline(always)]
    fn part<const N: usize>(values: &[Self; N], part: usize) -> [u32; N] {
        match part {
            0 => values.map(nearest_bf16),
            _ => values.map(|value| nearest_bf16(value - Self::from_bits(nearest_bf16(value)))),
        }
    }
}

/// Lays out up to [`SIDE`] rows and columns as a chunk.
fn fill<T: Value>(chunk: &mut [Line], side: Side, parts: Parts, values: &[T], part: &View<'_>) {
    assert_eq!(chunk.len(), parts.chunk_len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { fill_avx512(chunk, side, parts, values, part) };
    }
    fill_any(chunk, side, parts, values, part);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fill_avx512<T: Value>(chunk: &mut [Line], side: Side, parts: Parts, values: &[T], part: &View<'_>) {
    fill_any(chunk, side, parts, values, part);
}

#[inline(always)]
fn fill_any<T: Value>(chunk: &mut [Line], side: Side, parts: Parts, values: &[T], part: &View<'_>) {
    let ([rows, columns], [row, column]) = (part.size, part.strides);
    if [rows, columns] != [SIDE, SIDE] {
        // At an edge of the matrix: filled up with zeros.
        let mut square = [[T::default(); SIDE]; SIDE];
        for (d, to) in square.iter_mut().enumerate().take(rows) {
            for (c, to) in to.iter_mut().enumerate().take(columns) {
                *to = values[d * row + c * column];
            }
        }
        return fill_whole(chunk, side, parts, square.as_flattened(), [SIDE, 1]);
    }
    fill_whole(chunk, side, parts, values, [row, column]);
}

#[inline(always)]
fn fill_whole<T: Value>(chunk: &mut [Line], side: Side, parts: Parts, values: &[T], strides: [usize; 2]) {
    let by_column = strides[0] == 1;
    for part in 0..parts.count() {
        for half in 0..2 {
            let mut tile = [[0; 16]; TILE];
            for (i, line) in tile.iter_mut().enumerate() {
                *line = if by_column {
                    // A column's depth is contiguous.
                    T::neighbours(array(&values[(16 * half + i) * strides[1]..]), part)
                } else {
                    let [a, b] = [2 * i, 2 * i + 1]
                        .map(|d| T::part::<16>(array(&values[d * strides[0] + 16 * half..]), part));
                    std::array::from_fn(|c| a[c] >> 16 | b[c])
                };
            }
            let lines = &mut chunk[part * CHUNK + half * TILE..][..TILE];
            match by_column == (side == Side::Left) {
                true => copy(lines, &tile),
                false => transpose(lines, &tile),
            }
        }
    }
}

#[inline(always)]
fn array<T, const N: usize>(values: &[T]) -> &[T; N] {
    values.first_chunk().expect("the matrix has the values")
}

#[inline(always)]
fn copy(tile: &mut [Line], rows: &[[u32; 16]; TILE]) {
    tile.iter_mut().zip(rows).for_each(|(line, row)| line.0 = *row);
}

fn transpose(tile: &mut [Line], rows: &[[u32; 16]; TILE]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { transpose_avx512(tile, rows) };
    }
    for (i, line) in tile.iter_mut().enumerate() {
        line.0 = std::array::from_fn(|pair| rows[pair][i]);
    }
}

/// Exchanges blocks of 1, 2, 4 and 8 values between rows that are as far apart. The compiler would move single values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn transpose_avx512(tile: &mut [Line], rows: &[[u32; 16]; TILE]) {
    use std::arch::x86_64::{
        __m512i, _mm512_shuffle_i32x4, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };
    let a: [__m512i; TILE] = bytemuck::cast(*rows);
    let b: [__m512i; TILE] = std::array::from_fn(|i| {
        let [x, y] = [a[i & !1], a[i | 1]];
        if i & 1 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    // Columns 0 to 3 of each lane of four, by rows of four.
    let c: [__m512i; TILE] = std::array::from_fn(|i| {
        let first = i & !3 | (i >> 1 & 1);
        let [x, y] = [b[first], b[first + 2]];
        if i & 1 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    let d: [__m512i; TILE] = std::array::from_fn(|i| {
        let first = i & !7 | (i & 3);
        let [x, y] = [c[first], c[first + 4]];
        if i & 4 == 0 { _mm512_shuffle_i32x4::<0x88>(x, y) } else { _mm512_shuffle_i32x4::<0xDD>(x, y) }
    });
    let e: [__m512i; TILE] = std::array::from_fn(|i| {
        let [x, y] = [d[i & 7], d[i & 7 | 8]];
        if i & 8 == 0 { _mm512_shuffle_i32x4::<0x88>(x, y) } else { _mm512_shuffle_i32x4::<0xDD>(x, y) }
    });
    copy(tile, &bytemuck::cast(e));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_exchanges_rows_and_columns() {
        let rows: [[u32; 16]; TILE] = std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as u32));
        let mut tile = [Line([0; 16]); TILE];
        transpose(&mut tile, &rows);
        for (i, line) in tile.iter().enumerate() {
            assert_eq!(line.0, std::array::from_fn(|j| rows[j][i]), "row {i}");
        }
    }
}
