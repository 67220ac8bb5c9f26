//! `x · Wᵀ` for one to four rows of x, as in generation. Every weight is used so few times that reading the packed words takes
//! most of the time.
//!
//! Weights are dequantized in registers and multiplied at once. Some tiles of columns are read from top to bottom, with prefetches a
//! few rows ahead. They are as wide as the number of threads allows: memory is read faster in long runs.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::cut_columns;
use super::simd::{Isa, Kernel, LANES, Lanes, Simd};
use super::unpack::{
    BLOCKS, GroupLanes, GroupRow, GroupTable, MIXED, TILE, UnitRows, UnitWords, for_each_code, unit_codes,
    unit_groups, with_width,
};
use crate::pack::PackedView;

/// The most rows of x here.
pub(super) const MAX_ROWS: usize = 4;

/// Distance of the prefetch of words, in units. Of 1, 2, 4 and 8 the fastest for memory-bound matrices: twice as fast as without
/// prefetches.
const PREFETCH_UNITS: usize = 4;

/// The most tiles of a task. Runs of 4 kB, of four tiles, are read 1.5 times as fast as those of one tile; longer ones are not faster.
const MAX_TILES: usize = 4;
const MAX_BLOCKS: usize = MAX_TILES * BLOCKS;

/// `y = x · Wᵀ` for 1 to [`MAX_ROWS`] rows; `y` is `[M, N]`.
pub(super) fn matmul_few_rows(isa: Isa, x: &[f32], w: &PackedView<'_>, y: &mut [f32]) {
    match x.len() / w.in_features() {
        1 => with_width!(w.bits().get(), |BITS, WORDS| each_task::<BITS, WORDS, 1>(isa, x, w, y)),
        2 => with_width!(w.bits().get(), |BITS, WORDS| each_task::<BITS, WORDS, 2>(isa, x, w, y)),
        3 => with_width!(w.bits().get(), |BITS, WORDS| each_task::<BITS, WORDS, 3>(isa, x, w, y)),
        4 => with_width!(w.bits().get(), |BITS, WORDS| each_task::<BITS, WORDS, 4>(isa, x, w, y)),
        rows => unreachable!("{rows} rows, at most {MAX_ROWS} expected"),
    }
}

fn each_task<const BITS: usize, const WORDS: usize, const M: usize>(
    isa: Isa,
    x: &[f32],
    w: &PackedView<'_>,
    y: &mut [f32],
) {
    let groups = unit_groups(w);
    let tiles = w.out_features().div_ceil(TILE) / (2 * rayon::current_num_threads());
    let columns = tiles.clamp(1, MAX_TILES) * TILE;
    let tasks = cut_columns(y, w.out_features(), columns);
    tasks.into_par_iter().enumerate().for_each_init(GroupTable::default, |table, (t, y)| {
        isa.run(Task::<BITS, WORDS, M> { x, w, groups: &groups, first_column: t * columns, y, table });
    });
}

/// Some tiles of columns.
struct Task<'a, 'y, const BITS: usize, const WORDS: usize, const M: usize> {
    x: &'a [f32],
    w: &'a PackedView<'a>,
    groups: &'a [u32],
    first_column: usize,
    y: Vec<&'y mut [f32]>,
    table: &'a mut GroupTable,
}

impl<const BITS: usize, const WORDS: usize, const M: usize> Kernel for Task<'_, '_, BITS, WORDS, M> {
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize, const VECTORS: usize>(self, simd: S) {
        let Self { x, w, groups, first_column, y, table } = self;
        let columns = first_column..first_column + y[0].len();
        let blocks = columns.len().div_ceil(LANES);
        let codes = unit_codes(BITS, WORDS);
        table.fill::<BITS, WORDS>(w, 0..w.in_features(), columns.clone());
        let mut total = [[Lanes::ZERO; M]; MAX_BLOCKS];
        let total = &mut total[..blocks];
        let mut unit = 0;
        while unit < groups.len() {
            let group = groups[unit];
            if group == MIXED {
                let rows = UnitRows::<WORDS>::new(w, unit, columns.clone());
                let ahead =
                    UnitRows::<WORDS>::new(w, (unit + PREFETCH_UNITS).min(groups.len() - 1), columns.clone());
                let features = unit * codes..(unit + 1) * codes;
                let xs = cut_rows::<M>(x, w.in_features(), features.clone());
                let mut lanes = [table.group(w.g_idx()[features.start] as usize); 32];
                for (lanes, g) in lanes.iter_mut().zip(&w.g_idx()[features]) {
                    *lanes = table.group(*g as usize);
                }
                for b in 0..total.len() {
                    ahead.prefetch(b);
                    add_mixed::<S, BITS, WORDS, M>(simd, &rows.block(simd, b), &lanes, b, &xs, &mut total[b]);
                }
                unit += 1;
                continue;
            }
            let lanes = table.group(group as usize);
            let mut sums = [[Lanes::ZERO; M]; MAX_BLOCKS];
            let sums = &mut sums[..blocks];
            while unit < groups.len() && groups[unit] == group {
                let rows = UnitRows::<WORDS>::new(w, unit, columns.clone());
                let ahead =
                    UnitRows::<WORDS>::new(w, (unit + PREFETCH_UNITS).min(groups.len() - 1), columns.clone());
                let xs = cut_rows::<M>(x, w.in_features(), unit * codes..(unit + 1) * codes);
                for b in 0..sums.len() {
                    ahead.prefetch(b);
                    add_uniform::<S, BITS, WORDS, M>(
                        simd,
                        &rows.block(simd, b),
                        &lanes[b],
                        &xs,
                        &mut sums[b],
                    );
                }
                unit += 1;
            }
            for b in 0..blocks {
                for m in 0..M {
                    let total = &mut total[b][m].0;
                    let sum = simd.mul_add(
                        simd.load(&lanes[b].scale.0),
                        simd.load(&sums[b][m].0),
                        simd.load(total),
                    );
                    simd.store(sum, total);
                }
            }
        }
        for (m, y) in y.into_iter().enumerate() {
            for (y, total) in y.chunks_mut(LANES).zip(total.iter()) {
                y.copy_from_slice(&total[m].0[..y.len()]);
            }
        }
    }
}

/// The given features of every row of x `[M, K]`.
#[inline(always)]
fn cut_rows<const M: usize>(x: &[f32], in_features: usize, features: Range<usize>) -> [&[f32]; M] {
    let mut rows: [&[f32]; M] = [&[]; M];
    for (m, row) in rows.iter_mut().enumerate() {
        *row = &x[m * in_features..][features.clone()];
    }
    rows
}

/// `sums += x · (q - z)` for a unit of one group; the group's scale is applied at its end.
#[inline(always)]
fn add_uniform<S: Simd, const BITS: usize, const WORDS: usize, const M: usize>(
    simd: S,
    words: &UnitWords<S, WORDS>,
    lanes: &GroupLanes,
    xs: &[&[f32]; M],
    sums: &mut [Lanes; M],
) {
    let zero = simd.load(&lanes.zero.0);
    let mut vectors = load(simd, sums);
    for_each_code!(S, BITS, WORDS, |j| {
        let weights = simd.sub(words.code::<BITS>(simd, j), zero);
        for m in 0..M {
            vectors[m] = simd.mul_add(weights, simd.splat(xs[m][j]), vectors[m]);
        }
    });
    store(simd, &vectors, sums);
}

/// `sums += x · s(q - z)` for a unit whose code `j` has the scales and zero points `rows[j]`.
#[inline(always)]
fn add_mixed<S: Simd, const BITS: usize, const WORDS: usize, const M: usize>(
    simd: S,
    words: &UnitWords<S, WORDS>,
    rows: &[&GroupRow; 32],
    b: usize,
    xs: &[&[f32]; M],
    sums: &mut [Lanes; M],
) {
    let mut vectors = load(simd, sums);
    for_each_code!(S, BITS, WORDS, |j| {
        let lanes = &rows[j][b];
        let steps = simd.sub(words.code::<BITS>(simd, j), simd.load(&lanes.zero.0));
        let weights = simd.mul(steps, simd.load(&lanes.scale.0));
        for m in 0..M {
            vectors[m] = simd.mul_add(weights, simd.splat(xs[m][j]), vectors[m]);
        }
    });
    store(simd, &vectors, sums);
}

#[inline(always)]
fn load<S: Simd, const M: usize>(simd: S, from: &[Lanes; M]) -> [S::Floats; M] {
    let mut vectors = [simd.splat(0.0); M];
    for m in 0..M {
        vectors[m] = simd.load(&from[m].0);
    }
    vectors
}

#[inline(always)]
fn store<S: Simd, const M: usize>(simd: S, vectors: &[S::Floats; M], to: &mut [Lanes; M]) {
    for m in 0..M {
        simd.store(vectors[m], &mut to[m].0);
    }
}
