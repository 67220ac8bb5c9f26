//! Unpacks GPTQ tensors to f32: codes, zero points, scales and dequantized weights, a block of 16 output features at a time.
//!
//! Shapes use K = input features, N = output features, G = groups, b = bits, as the format does.
//! A *unit* is the smallest run of input features that fills whole words: 32 codes in three words for 3 bits, else the `32 / b` codes of one word.
//! A *block* is [`LANES`] adjacent output features, a *tile* is [`BLOCKS`] blocks.

use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use crate::pack::PackedView;

use super::simd::{LANES, Lanes, Simd, prefetch};

/// Blocks of a tile.
pub(super) const BLOCKS: usize = 16;
/// Output features of a tile: a whole number of words of `qzeros` at every width.
pub(super) const TILE: usize = BLOCKS * LANES;
/// Marks a unit whose input features belong to more than one group.
pub(super) const MIXED: u32 = u32::MAX;

/// Evaluates `$body` with the width `$bits` of a view, and the words of its units, as the constants `$BITS` and `$WORDS`.
macro_rules! with_width {
    ($bits:expr, |$BITS:ident, $WORDS:ident| $body:expr) => {
        match $bits {
            2 => with_width!(@ $BITS = 2, $WORDS = 1, $body),
            3 => with_width!(@ $BITS = 3, $WORDS = 3, $body),
            4 => with_width!(@ $BITS = 4, $WORDS = 1, $body),
            8 => with_width!(@ $BITS = 8, $WORDS = 1, $body),
            bits => unreachable!("a view of {bits}-bit codes passed its checks"),
        }
    };
    (@ $BITS:ident = $bits:literal, $WORDS:ident = $words:literal, $body:expr) => {{
        const $BITS: usize = $bits;
        const $WORDS: usize = $words;
        $body
    }};
}
pub(super) use with_width;

/// Runs `$body` for every code `$j` of a unit: unrolled, with constant shifts and words, if the instruction set is
/// [`Simd::UNROLLED`], else in a loop.
macro_rules! for_each_code {
    ($S:ident, $BITS:ident, $WORDS:ident, |$j:ident| $body:block) => {
        if const { $S::UNROLLED } {
            for_each_code!(@ unit_codes($BITS, $WORDS), $j, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
        } else {
            for $j in 0..unit_codes($BITS, $WORDS) $body
        }
    };
    (@ $codes:expr, $j:ident, $body:block, $($index:literal)*) => {
        $(if const { $index < $codes } { let $j: usize = $index; $body })*
    };
}
pub(super) use for_each_code;

/// Codes in one unit.
pub(super) const fn unit_codes(bits: usize, words: usize) -> usize {
    words * 32 / bits
}

/// The group that all input features of a unit share, or [`MIXED`], for each unit of K.
pub(super) fn unit_groups(w: &PackedView<'_>) -> Vec<u32> {
    let codes = if w.bits().get() == 3 { 32 } else { 32 / w.bits().get() as usize };
    let shared = |unit: &[i32]| unit.iter().all(|g| *g == unit[0]).then_some(unit[0] as u32);
    w.g_idx().chunks_exact(codes).map(|unit| shared(unit).unwrap_or(MIXED)).collect()
}

/// The words of one unit for a block of output features.
#[derive(Clone, Copy)]
pub(super) struct UnitWords<S: Simd, const WORDS: usize>([S::Words; WORDS]);

impl<S: Simd, const WORDS: usize> UnitWords<S, WORDS> {
    /// Code `j` of the unit for each lane.
    #[inline(always)]
    pub(super) fn code<const BITS: usize>(&self, simd: S, j: usize) -> S::Floats {
        let (i, shift) = (j * BITS / 32, j * BITS % 32);
        simd.codes(self.0[i], self.0[(i + 1).min(WORDS - 1)], shift as u32, BITS as u32)
    }
}

/// The rows of `qweight` that hold one unit, cut to the columns of a tile.
pub(super) struct UnitRows<'a, const WORDS: usize>([&'a [i32]; WORDS]);

impl<'a, const WORDS: usize> UnitRows<'a, WORDS> {
    #[inline(always)]
    pub(super) fn new(w: &PackedView<'a>, unit: usize, columns: Range<usize>) -> Self {
        let mut rows: [&[i32]; WORDS] = [&[]; WORDS];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &w.qweight()[(unit * WORDS + i) * w.out_features()..][columns.clone()];
        }
        Self(rows)
    }

    /// The words of block `b`, with zeros beyond the last column.
    #[inline(always)]
    pub(super) fn block<S: Simd>(&self, simd: S, b: usize) -> UnitWords<S, WORDS> {
        let mut words = [simd.load_words(&[0; LANES]); WORDS];
        for i in 0..WORDS {
            let row = &self.0[i][b * LANES..];
            words[i] = match row.first_chunk() {
                Some(whole) => simd.load_words(whole),
                None => simd.load_words(&padded(row)),
            };
        }
        UnitWords(words)
    }

    /// Prefetches the words of block `b`.
    #[inline(always)]
    pub(super) fn prefetch(&self, b: usize) {
        for row in &self.0 {
            prefetch(row, b * LANES);
        }
    }
}

/// Pads a partial block. It is rare, and not inlined so that the loops over whole blocks stay small.
#[inline(never)]
pub(super) fn padded<T: Pod>(row: &[T]) -> [T; LANES] {
    let mut block = [T::zeroed(); LANES];
    block[..row.len()].copy_from_slice(row);
    block
}

/// Scales and zero points of one block in one group.
#[derive(Clone, Copy)]
pub(super) struct GroupLanes {
    pub(super) scale: Lanes,
    pub(super) zero: Lanes,
}

/// Scales and zero points of some blocks in one group; undefined beyond the last column.
pub(super) type GroupRow = [GroupLanes];

/// Decoded scales and zero points of some columns for a range of groups. A thread reuses it for all its tasks.
#[derive(Default)]
pub(super) struct GroupTable {
    first: usize,
    /// Blocks of a group.
    blocks: usize,
    lanes: Vec<GroupLanes>,
}

impl GroupTable {
    /// Decodes `columns` (starting at a multiple of [`TILE`]) for the groups of the input features `features`.
    #[inline(always)]
    pub(super) fn fill<const BITS: usize, const WORDS: usize>(
        &mut self,
        w: &PackedView<'_>,
        features: Range<usize>,
        columns: Range<usize>,
    ) {
        let (low, high) =
            w.g_idx()[features].iter().fold((i32::MAX, 0), |(low, high), &g| (low.min(g), high.max(g)));
        let groups = low as usize..high as usize + 1;
        (self.first, self.blocks) = (groups.start, columns.len().div_ceil(LANES));
        let none = GroupLanes { scale: Lanes::ZERO, zero: Lanes::ZERO };
        self.lanes.resize(groups.len() * self.blocks, none);
        let zero_words = w.qzeros().len() / w.groups();
        for (g, row) in groups.zip(self.lanes.chunks_exact_mut(self.blocks)) {
            for (lanes, scales) in
                row.iter_mut().zip(w.scales()[g * w.out_features()..][columns.clone()].chunks(LANES))
            {
                for (to, from) in lanes.scale.0.iter_mut().zip(scales) {
                    *to = f16_to_f32(*from);
                }
            }
            let words = &w.qzeros()[g * zero_words..][columns.start * BITS / 32..columns.end * BITS / 32];
            if WORDS == 1 {
                decode_zeros::<BITS>(words, u32::from(w.format().zero_offset()), row);
            } else {
                decode_straddling_zeros::<BITS>(words, u32::from(w.format().zero_offset()), row);
            }
        }
    }

    /// The scales and zero points of group `g`.
    #[inline(always)]
    pub(super) fn group(&self, g: usize) -> &GroupRow {
        &self.lanes[(g - self.first) * self.blocks..][..self.blocks]
    }
}

/// Zero points of widths that divide 32.
#[inline(always)]
fn decode_zeros<const BITS: usize>(words: &[i32], offset: u32, row: &mut GroupRow) {
    for (lanes, words) in row.iter_mut().zip(words.chunks(LANES * BITS / 32)) {
        for (zeros, &word) in lanes.zero.0.chunks_exact_mut(32 / BITS).zip(words) {
            for (j, zero) in zeros.iter_mut().enumerate() {
                *zero = ((word as u32 >> (j * BITS) & ((1 << BITS) - 1)) + offset) as i32 as f32;
            }
        }
    }
}

/// Zero points of any width, one by one.
#[inline(always)]
fn decode_straddling_zeros<const BITS: usize>(words: &[i32], offset: u32, row: &mut GroupRow) {
    for n in 0..words.len() * 32 / BITS {
        let (i, shift) = (n * BITS / 32, n * BITS % 32);
        let mut code = words[i] as u32 >> shift;
        if shift + BITS > 32 {
            code |= (words[i + 1] as u32) << (32 - shift);
        }
        row[n / LANES].zero.0[n % LANES] = ((code & ((1 << BITS) - 1)) + offset) as i32 as f32;
    }
}

/// fp16 to f32, exactly, in integer arithmetic that vectorizes on every instruction set.
#[inline(always)]
fn f16_to_f32(value: f16) -> f32 {
    const SUBNORMAL_STEP: f32 = 1.0 / 16_777_216.0;
    let bits = u32::from(value.to_bits());
    let (sign, exponent, magnitude) = ((bits & 0x8000) << 16, bits & 0x7c00, (bits & 0x7fff) << 13);
    let subnormal = ((bits & 0x3ff) as i32 as f32 * SUBNORMAL_STEP).to_bits();
    let normal = magnitude + ((127 - 15) << 23);
    let not_finite = magnitude | 0x7f80_0000;
    let magnitude = if exponent == 0 {
        subnormal
    } else if exponent == 0x7c00 {
        not_finite
    } else {
        normal
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::fixture::{Fixture, Order, Random, Spec};

    #[test]
    fn every_f16_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (value, converted) = (f16::from_bits(bits), f16_to_f32(f16::from_bits(bits)));
            assert!(
                converted.to_bits() == value.to_f32().to_bits() || converted.is_nan() && value.is_nan(),
                "{bits:#06x} is {value:e}, not {converted:e}"
            );
        }
    }

    #[test]
    fn units_that_straddle_groups_are_mixed() {
        let spec = Spec {
            bits: 4,
            in_features: 40,
            out_features: 8,
            group_size: 20,
            order: Order::Sequential,
            zero_offset: 0,
        };
        assert_eq!(unit_groups(&Fixture::random(spec, &mut Random(1)).view()), [0, 0, MIXED, 1, 1]);
    }
}
