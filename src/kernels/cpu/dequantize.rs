//! Packed GPTQ weights to f32: in panels for the blocked multiplication, and as the whole dense matrix.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::{Isa, Kernel, LANES, Lanes, Simd};
use super::unpack::{
    GroupTable, MIXED, TILE, UnitRows, UnitWords, for_each_code, unit_codes, unit_groups, with_width,
};
use crate::pack::PackedView;

/// Input features of a panel: a whole number of units at every width. A panel of 32 columns is 32 KiB and stays in the L1 cache.
pub(super) const PANEL_FEATURES: usize = 256;

/// Dequantized weights of some blocks of a tile, for up to [`PANEL_FEATURES`] input features, with scales and zero points of the
/// tile. A thread reuses it for all its tasks.
pub(super) struct Panel {
    pub(super) table: GroupTable,
    weights: Box<[Lanes]>,
}

/// The most blocks of a panel.
const MAX_VECTORS: usize = 2;

impl Default for Panel {
    fn default() -> Self {
        Self {
            table: GroupTable::default(),
            weights: vec![Lanes::ZERO; PANEL_FEATURES * MAX_VECTORS].into_boxed_slice(),
        }
    }
}

impl Panel {
    /// Dequantizes `VECTORS` blocks, from `first_block` on, of `columns` (a tile or less) and of `units`, for which the table has been
    /// filled: `[k][vector]`. Values beyond the last column are undefined.
    #[inline(always)]
    pub(super) fn dequantize<S: Simd, const BITS: usize, const WORDS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        w: &PackedView<'_>,
        unit_groups: &[u32],
        units: &Range<usize>,
        columns: &Range<usize>,
        first_block: usize,
    ) -> &[Lanes] {
        const { assert!(VECTORS <= MAX_VECTORS) };
        let codes = unit_codes(BITS, WORDS);
        let blocks = columns.len().div_ceil(LANES);
        let panel = &mut self.weights[..units.len() * codes * VECTORS];
        for v in 0..VECTORS.min(blocks - first_block) {
            let b = first_block + v;
            for (unit, weights) in units.clone().zip(panel.chunks_exact_mut(codes * VECTORS)) {
                let rows = UnitRows::<WORDS>::new(w, unit, columns.clone());
                rows.prefetch(b + VECTORS);
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
        panel
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
    // Products of a scale are exact, so that `s q - s z` is `s (q - z)`.
    let scale = simd.load(&lanes.scale.0);
    let least = simd.sub(simd.splat(0.0), simd.mul(scale, simd.load(&lanes.zero.0)));
    for_each_code!(S, BITS, WORDS, |j| {
        simd.store(simd.mul_add(words.code::<BITS>(simd, j), scale, least), &mut weights[j * VECTORS].0);
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
        let steps = simd.sub(words.code::<BITS>(simd, j), simd.load(&lanes.zero.0));
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
            for first in (0..columns.len().div_ceil(LANES)).step_by(VECTORS) {
                let panel = panel.dequantize::<S, BITS, WORDS, VECTORS>(
                    simd,
                    w,
                    unit_groups,
                    &units,
                    &columns,
                    first,
                );
                let rows = out.chunks_exact_mut(w.out_features());
                for (row, weights) in rows.zip(panel.as_chunks::<VECTORS>().0) {
                    let own = row[columns.clone()].chunks_mut(LANES).skip(first);
                    own.zip(weights).for_each(|(to, from)| to.copy_from_slice(&from.0[..to.len()]));
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
