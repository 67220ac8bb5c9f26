//! Operands in the layout of tile registers.

use super::SIDE;

/// A row of a tile register: one cache line, 32 bf16 values in pairs, the first of a pair in the low half.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Line(pub(super) [u32; 16]);

/// Lines of a tile register.
pub(super) const TILE: usize = 16;
/// Lines of one part of a chunk, [`SIDE`] rows of [`SIDE`] columns: two tiles, of 16 columns each.
pub(super) const CHUNK: usize = 2 * TILE;

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

/// Lays out a square as a chunk in two parts.
pub fn fill_from_f32(chunk: &mut [Line], side: Side, square: &Square) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { fill_from_f32_avx512(chunk, side, square) };
    }
    fill_from_f32_any(chunk, side, square);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fill_from_f32_avx512(chunk: &mut [Line], side: Side, square: &Square) {
    fill_from_f32_any(chunk, side, square);
}

#[inline(always)]
fn fill_from_f32_any(chunk: &mut [Line], side: Side, square: &Square) {
    assert_eq!(chunk.len(), Parts::Two.chunk_len());
    for half in 0..2 {
        let (mut value, mut rest) = ([[0u32; 16]; TILE], [[0u32; 16]; TILE]);
        for pair in 0..TILE {
            for c in 0..16 {
                let (a, b) = (square[2 * pair][16 * half + c], square[2 * pair + 1][16 * half + c]);
                let (a_value, b_value) = (nearest_bf16(a), nearest_bf16(b));
                value[pair][c] = a_value >> 16 | b_value;
                let rest_of = |x: f32, bits: u32| nearest_bf16(x - f32::from_bits(bits));
                rest[pair][c] = rest_of(a, a_value) >> 16 | rest_of(b, b_value);
            }
        }
        store(&mut chunk[half * TILE..][..TILE], side, &value);
        store(&mut chunk[CHUNK + half * TILE..][..TILE], side, &rest);
    }
}

/// The nearest bf16 value, ties to even, as the bits of an fp32 value.
///
/// For numbers only: it has no branch for NaN, as `half`'s conversion has, so that it vectorizes.
#[inline(always)]
pub fn nearest_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000
}

/// Lays out up to [`SIDE`] rows of up to [`SIDE`] bf16 values as a chunk in one part.
pub(super) fn fill_from_bf16(chunk: &mut [Line], side: Side, rows: &[&[u16]]) {
    assert!(chunk.len() == CHUNK && rows.len() <= SIDE);
    let mut pairs = [[0u32; SIDE]; TILE];
    for (d, row) in rows.iter().enumerate() {
        let shift = d % 2 * 16;
        for (pair, &value) in pairs[d / 2].iter_mut().zip(*row) {
            *pair |= u32::from(value) << shift;
        }
    }
    for half in 0..2 {
        let tile = pairs.map(|row| std::array::from_fn(|c| row[16 * half + c]));
        store(&mut chunk[half * TILE..][..TILE], side, &tile);
    }
}

/// `pairs[p][c]` holds rows `2p` and `2p + 1` of column `c`.
#[inline(always)]
fn store(tile: &mut [Line], side: Side, pairs: &[[u32; 16]; TILE]) {
    for (i, line) in tile.iter_mut().enumerate() {
        line.0 = match side {
            Side::Left => std::array::from_fn(|pair| pairs[pair][i]),
            Side::Right => pairs[i],
        };
    }
}
