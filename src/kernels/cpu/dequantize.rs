//! Packed GPTQ weights to f32: in panels for the blocked multiplication, and as the whole dense matrix.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::{Isa, Kernel, LANES, Lanes, Simd};
use super::unpack::{
    BLOCKS, GroupTable, MIXED, TILE, UnitRows, UnitWords, for_each_code, unit_codes, unit_groups, with_width,
};
use crate::pack::PackedView;

/// Input features of a panel: a whole number of units at every width. A panel of 32 columns is 32 KiB and stays in the L1 cache.
pub(super) const PANEL_FEATURES: usize = 256;

/// A tile of dequantized weights for up to [`PANEL_FEATURES`] input features, with its scales and zero points. A thread reuses it
/// for all its tasks.
///
/// Blocks lie in strips of `VECTORS` (a number that divides [`BLOCKS`]): `weights[strip][k][vector]`.
pub(super) struct Panel {
    pub(super) table: GroupTable,
    pub(super) weights: Box<[Lanes]>,
}

impl Default for Panel {
    fn default() -> Self {
        Self {
            table: GroupTable::default(),
            weights: vec![Lanes::ZERO; PANEL_FEATURES * BLOCKS].into_boxed_slice(),
        }
    }
}

impl Panel {
    /// Dequantizes `columns` (a tile or less) of `units`, for which the table has been filled.
    /// Values beyond the last column are not changed.
    #[inline(always)]
    pub(super) fn dequantize<S: Simd, const BITS: usize, const WORDS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        w: &PackedView<'_>,
        unit_groups: &[u32],
        units: Range<usize>,
        columns: Range<usize>,
    ) {
        let codes = unit_codes(BITS, WORDS);
        let blocks = columns.len().div_ceil(LANES);
        let strips = self.weights.chunks_exact_mut(units.len() * codes * VECTORS);
        for (strip, weights) in strips.enumerate().take(blocks.div_ceil(VECTORS)) {
            for (unit, weights) in units.clone().zip(weights.chunks_exact_mut(codes * VECTORS)) {
                let rows = UnitRows::<WORDS>::new(w, unit, columns.clone());
                for v in 0..VECTORS {
                    let b = strip * VECTORS + v;
                    if b >= blocks {
                        break;
                    }
                    let words = rows.block(simd, b);
                    let weights = &mut weights[v..];
                    if unit_groups[unit] == MIXED {
                        let groups = &w.g_idx()[unit * codes..][..codes];
                        store_mixed::<S, BITS, WORDS, VECTORS>(simd, &words, groups, &self.table, b, weights);
                    } else {
                        let g = unit_groups[unit] as usize;
                        store_uniform::<S, BITS, WORDS, VECTORS>(simd, &words, g, &self.table, b, weights);
                    }
                }
            }
        }
    }
}

/// Stores a unit of one group at every `VECTORS`-th place of `weights`.
#[inline(always)]
fn store_uniform<S: Simd, const BITS: usize, const WORDS: usize, const VECTORS: usize>(
    simd: S,
    words: &UnitWords<S, WORDS>,
    group: usize,
    table: &GroupTable,
    b: usize,
    weights: &mut [Lanes],
) {
    let lanes = &table.group(group)[b];
    let (scale, zero) = (simd.load(&lanes.scale.0), simd.load(&lanes.biased_zero.0));
    for_each_code!(S, BITS, WORDS, |j| {
        let steps = simd.sub(words.biased_codes::<BITS>(simd, j), zero);
        simd.store(simd.mul(steps, scale), &mut weights[j * VECTORS].0);
    });
}

/// Stores a unit whose code `j` is of group `groups[j]` at every `VECTORS`-th place of `weights`.
#[inline(always)]
fn store_mixed<S: Simd, const BITS: usize, const WORDS: usize, const VECTORS: usize>(
    simd: S,
    words: &UnitWords<S, WORDS>,
    groups: &[i32],
    table: &GroupTable,
    b: usize,
    weights: &mut [Lanes],
) {
    for_each_code!(S, BITS, WORDS, |j| {
        let lanes = &table.group(groups[j] as usize)[b];
        let steps = simd.sub(words.biased_codes::<BITS>(simd, j), simd.load(&lanes.biased_zero.0));
        simd.store(simd.mul(steps, simd.load(&lanes.scale.0)), &mut weights[j * VECTORS].0);
    });
}

/// Writes the dense weights `[K, N]`, row-major: `out[k, n] = s (q - z)`, exact in f32 for finite scales.
///
/// # Panics
/// If `out` does not have `K * N` elements.
pub fn dequantize_into(w: &PackedView<'_>, out: &mut [f32]) {
    dequantize_into_with(Isa::best(), w, out);
}

pub(super) fn dequantize_into_with(isa: Isa, w: &PackedView<'_>, out: &mut [f32]) {
    assert_eq!(out.len(), w.in_features() * w.out_features(), "out must be [K, N]");
    with_width!(w.bits().get(), |BITS, WORDS| dequantize_chunks::<BITS, WORDS>(isa, w, out));
}

fn dequantize_chunks<const BITS: usize, const WORDS: usize>(isa: Isa, w: &PackedView<'_>, out: &mut [f32]) {
    let unit_groups = unit_groups(w);
    out.par_chunks_mut(PANEL_FEATURES * w.out_features()).enumerate().for_each_init(
        Panel::default,
        |panel, (chunk, out)| {
            let first = chunk * PANEL_FEATURES;
            isa.run(Chunk::<BITS, WORDS> { w, unit_groups: &unit_groups, first, out, panel });
        },
    );
}

/// All output features of the input features from `first` on that fill `out`.
struct Chunk<'a, const BITS: usize, const WORDS: usize> {
    w: &'a PackedView<'a>,
    unit_groups: &'a [u32],
    first: usize,
    out: &'a mut [f32],
    panel: &'a mut Panel,
}

impl<const BITS: usize, const WORDS: usize> Kernel for Chunk<'_, BITS, WORDS> {
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let Self { w, unit_groups, first, out, panel } = self;
        let codes = unit_codes(BITS, WORDS);
        let features = first..first + out.len() / w.out_features();
        for start in (0..w.out_features()).step_by(TILE) {
            let columns = start..w.out_features().min(start + TILE);
            panel.table.fill::<BITS, WORDS>(w, features.clone(), columns.clone());
            let units = features.start / codes..features.end / codes;
            panel.dequantize::<S, BITS, WORDS, VECTORS>(simd, w, unit_groups, units, columns.clone());
            for (k, row) in out.chunks_exact_mut(w.out_features()).enumerate() {
                for (b, row) in row[columns.clone()].chunks_mut(LANES).enumerate() {
                    let weights = &panel.weights[(b / VECTORS * features.len() + k) * VECTORS + b % VECTORS];
                    row.copy_from_slice(&weights.0[..row.len()]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::fixture::{Fixture, Order, Random, Spec};

    /// Linears of every width in both orders and versions: tiny, with a partial last block, group and panel, and wider than a tile.
    fn fixtures() -> Vec<(Spec, Fixture)> {
        let mut random = Random(7);
        let mut fixtures = Vec::new();
        for (bits, unit) in [(2, 16), (3, 32), (4, 8), (8, 4)] {
            for (in_features, out_features, group_size) in
                [(32, unit, 32), (288, 256 + 3 * unit, 20), (128, 64, 32), (96, 32 + unit, 96)]
            {
                for order in [Order::Sequential, Order::Act] {
                    for zero_offset in [0, 1] {
                        let spec = Spec { bits, in_features, out_features, group_size, order, zero_offset };
                        fixtures.push((spec, Fixture::random(spec, &mut random)));
                    }
                }
            }
        }
        fixtures
    }

    #[test]
    fn dense_weights_are_exact_on_every_instruction_set() {
        for (spec, fixture) in fixtures() {
            let expected: Vec<f32> = fixture.dense().into_iter().map(|weight| weight as f32).collect();
            for isa in Isa::available() {
                let mut dense = vec![f32::NAN; expected.len()];
                dequantize_into_with(isa, &fixture.view(), &mut dense);
                assert!(dense == expected, "{spec:?} {isa:?}");
            }
        }
    }

    #[test]
    fn a_v1_zero_of_all_ones_is_not_wrapped_to_zero() {
        let spec = Spec {
            bits: 4,
            in_features: 8,
            out_features: 8,
            group_size: 8,
            order: Order::Sequential,
            zero_offset: 1,
        };
        let mut fixture = Fixture::random(spec, &mut Random(1));
        fixture.codes.fill(0);
        fixture.zeros.fill(15);
        fixture.scales.fill(half::f16::ONE);
        fixture.pack();
        let mut dense = vec![0.0; 64];
        dequantize_into(&fixture.view(), &mut dense);
        assert_eq!(dense, [-16.0; 64]);
    }
}
